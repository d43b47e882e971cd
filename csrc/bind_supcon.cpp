// supcon for Python: one panel of similarities at a time, its rows shared between threads.
#include <algorithm>
#include <limits>
#include <vector>

#include "bindings.h"
#include "kernels.h"
#include "parallel.h"

namespace py = pybind11;

namespace fusedloss {
namespace {

// (similarity, first, rows, columns, codes, mask, mask_back, common_shift, row_shift, negative_weight, positive_weight,
// share): addresses, 0 where there is none.
template <class T>
SupConPanel<T> panel_of(const py::tuple& t) {
    SupConPanel<T> panel;
    panel.similarity = pointer<T>(t[0].cast<uintptr_t>());
    panel.first = t[1].cast<int64_t>();
    panel.rows = t[2].cast<int64_t>();
    panel.columns = t[3].cast<int64_t>();
    panel.codes = pointer<const int32_t>(t[4].cast<uintptr_t>());
    panel.mask = pointer<const uint8_t>(t[5].cast<uintptr_t>());
    panel.mask_back = pointer<const uint8_t>(t[6].cast<uintptr_t>());
    panel.common_shift = T(t[7].cast<double>());
    panel.row_shift = pointer<T>(t[8].cast<uintptr_t>());
    panel.negative_weight = pointer<const T>(t[9].cast<uintptr_t>());
    panel.positive_weight = pointer<const T>(t[10].cast<uintptr_t>());
    panel.share = pointer<const T>(t[11].cast<uintptr_t>());
    return panel;
}

template <class T>
int threads_for(const SupConPanel<T>& panel, int threads) {
    return useful_threads(panel.rows * panel.columns, panel.rows, threads);
}

// The panel's columns that are anchors too: the others have no sums of their own.
template <class T>
int64_t anchor_columns(const SupConPanel<T>& panel, int64_t anchors) {
    return std::min(panel.columns, anchors - panel.first);
}

template <class T>
void supcon_maxima(const py::tuple& tuple, int64_t anchors, int threads) {
    const SupConPanel<T> panel = panel_of<T>(tuple);
    py::gil_scoped_release release;
    threads = threads_for(panel, threads);
    std::vector<T> found(panel.columns * threads, -std::numeric_limits<T>::infinity());
    const auto kernel = kernels().supcon<T>().maxima;
    parallel_ranges(panel.rows, threads, [&](int64_t first, int64_t last, int thread) {
        kernel(panel, panel.first + first, panel.first + last, found.data() + panel.columns * thread);
    });
    const int64_t kept = anchor_columns(panel, anchors);
    for (int thread = 0; thread < threads; ++thread)
        for (int64_t j = 0; j < kept; ++j) {
            T& top = panel.row_shift[panel.first + j];
            top = std::max(top, found[panel.columns * thread + j]);
        }
}

// sums: addresses of (sums of exp, sums over positives), double (anchors,).
template <class T>
void supcon_sums(const py::tuple& tuple, int64_t anchors, const py::tuple& sums, int threads) {
    const SupConPanel<T> panel = panel_of<T>(tuple);
    const SupConSums total{pointer<double>(sums[0].cast<uintptr_t>()), pointer<double>(sums[1].cast<uintptr_t>())};
    py::gil_scoped_release release;
    threads = threads_for(panel, threads);
    std::vector<double> found(2 * panel.columns * threads);
    const auto kernel = kernels().supcon<T>().sums;
    parallel_ranges(panel.rows, threads, [&](int64_t first, int64_t last, int thread) {
        double* columns = found.data() + 2 * panel.columns * thread;
        kernel(panel, panel.first + first, panel.first + last, total, {columns, columns + panel.columns});
    });
    const int64_t kept = anchor_columns(panel, anchors);
    for (int thread = 0; thread < threads; ++thread) {
        const double* columns = found.data() + 2 * panel.columns * thread;
        for (int64_t j = 0; j < kept; ++j) {
            total.exponentials[panel.first + j] += columns[j];
            total.positives[panel.first + j] += columns[panel.columns + j];
        }
    }
}

// slopes: addresses of (softmax, mean), T (columns of all panels,). Returns the sum of slope * (s - shift).
template <class T>
double supcon_backward(const py::tuple& tuple, const py::tuple& slopes, int threads) {
    const SupConPanel<T> panel = panel_of<T>(tuple);
    const SupConSlopes<T> given{pointer<const T>(slopes[0].cast<uintptr_t>()),
                                pointer<const T>(slopes[1].cast<uintptr_t>())};
    py::gil_scoped_release release;
    threads = threads_for(panel, threads);
    std::vector<double> moments(threads);
    const auto kernel = kernels().supcon<T>().sweep;
    parallel_ranges(panel.rows, threads, [&](int64_t first, int64_t last, int thread) {
        moments[thread] = kernel(panel, panel.first + first, panel.first + last, given);
    });
    double total = 0;
    for (const double moment : moments) total += moment;
    return total;
}

}  // namespace

void bind_supcon(py::module_& module) {
    module.def("supcon_maxima", [](const py::tuple& panel, bool is_double, int64_t anchors, int threads) {
        (is_double ? supcon_maxima<double> : supcon_maxima<float>)(panel, anchors, threads);
    });
    module.def("supcon_sums",
               [](const py::tuple& panel, bool is_double, int64_t anchors, const py::tuple& sums, int threads) {
                   (is_double ? supcon_sums<double> : supcon_sums<float>)(panel, anchors, sums, threads);
               });
    module.def("supcon_backward", [](const py::tuple& panel, bool is_double, const py::tuple& slopes, int threads) {
        return (is_double ? supcon_backward<double> : supcon_backward<float>)(panel, slopes, threads);
    });
}

}  // namespace fusedloss
