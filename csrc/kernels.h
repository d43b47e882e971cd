// The kernels of one SIMD level, as function pointers; kernels() are those of the level picked for this machine.
#pragma once

#include <type_traits>

#include "class_stats.h"
#include "linear_ce.h"
#include "softmax_ce.h"
#include "supcon.h"

namespace fusedloss {

// Each kernel takes a range of rows [first, last) and the index of the thread that runs it.
template <class T>
struct SoftmaxKernels {
    void (*ce)(const SoftmaxCE<T>&, int64_t first, int64_t last, int thread);
    void (*stats)(const SoftmaxStatistics<T>&, int64_t first, int64_t last, int thread);
    void (*sweep)(const SoftmaxStatisticsBackward<T>&, int64_t first, int64_t last, int thread);
};

template <class T>
struct ClassStatsKernels {
    void (*widen)(const ClassStats<T>&, int64_t row, T* out);
    void (*sum)(const ClassStats<T>&, int64_t first, int64_t last, int thread);  // a range of segments
    void (*write)(const ClassStats<T>&, int64_t label, const double* slot);
    void (*update)(const ClassStatsUpdate<T>&, int64_t first, int64_t last);  // a range of classes
    void (*magnitudes)(const RowMagnitudes<T>&, int64_t first, int64_t last);
};

// Rows [begin, end) of a panel, counted like its columns.
template <class T>
struct SupConKernels {
    void (*maxima)(const SupConPanel<T>&, int64_t begin, int64_t end, T* column_max);
    void (*sums)(const SupConPanel<T>&, int64_t begin, int64_t end, SupConSums rows, SupConSums columns);
    double (*sweep)(const SupConPanel<T>&, int64_t begin, int64_t end, SupConSlopes<T>);
};

struct LinearKernels {
    void (*norms)(const RowNorms&, int64_t first, int64_t last);
    void (*project_float)(const Projection<float>&, int64_t first, int64_t last);
    void (*project_double)(const Projection<double>&, int64_t first, int64_t last);
    void (*target_products)(const LabelPairs&, int64_t first, int64_t last);
    void (*gradients_float)(const LabelGradients<float>&, bool of_weight, int64_t first, int64_t last);
    void (*gradients_double)(const LabelGradients<double>&, bool of_weight, int64_t first, int64_t last);

    template <class T>
    auto label_gradients() const {
        if constexpr (std::is_same_v<T, float>) return gradients_float;
        else return gradients_double;
    }
};

struct Kernels {
    SoftmaxKernels<float> softmax_float;
    SoftmaxKernels<double> softmax_double;
    ClassStatsKernels<float> class_stats_float;
    ClassStatsKernels<double> class_stats_double;
    SupConKernels<float> supcon_float;
    SupConKernels<double> supcon_double;
    LinearKernels linear;

    template <class T>
    const SoftmaxKernels<T>& softmax() const {
        if constexpr (std::is_same_v<T, float>) return softmax_float;
        else return softmax_double;
    }
    template <class T>
    const ClassStatsKernels<T>& class_stats() const {
        if constexpr (std::is_same_v<T, float>) return class_stats_float;
        else return class_stats_double;
    }
    template <class T>
    const SupConKernels<T>& supcon() const {
        if constexpr (std::is_same_v<T, float>) return supcon_float;
        else return supcon_double;
    }
};

const Kernels& kernels();
const char* simd_level();

// The table of each level, for the one that picks.
namespace baseline {
Kernels table();
}
namespace avx2 {
Kernels table();
}
namespace avx512 {
Kernels table();
}

}  // namespace fusedloss
