// Arguments of the softmax kernels. T is the type they compute in: float, or double for float64 logits.
#pragma once

#include <cstdint>

#include "view.h"

namespace fusedloss {

// z = scale * x + bias and the target distribution q: everything that a sweep over the rows reads.
template <class T>
struct SoftmaxInputs {
    View logits;
    View probabilities;               // soft targets; data is null with labels
    const int64_t* labels = nullptr;  // (rows,); null with soft targets
    int64_t ignore_index = -100;
    const T* scale = nullptr;         // (K,) or null
    const T* bias = nullptr;          // (K,) or null
    const T* class_weight = nullptr;  // (K,) or null
    double weight_sum = 0;            // sum of class_weight, K without
};

// Where a sweep writes dL/dx and, when asked, the column sums dL/dscale and dL/dbias (per-thread partial sums).
struct SoftmaxGradients {
    View logits;                   // data is null when not wanted
    double* scale_bias = nullptr;  // (threads, 2, K) or null
};

// softmax_ce: one read of the logits gives the loss of each row and its gradient.
template <class T>
struct SoftmaxCE {
    SoftmaxInputs<T> inputs;
    double smoothing = 0;
    const T* row_smoothing = nullptr;  // (rows,), in place of smoothing, or null
    double focal_gamma = 0, z_loss = 0;
    double common_scale = 1;       // multiplies the gradient of every row
    const T* row_scale = nullptr;  // (rows,) multiplies a row's loss in the total and its gradient, or null
    T* row_loss = nullptr;         // (rows,), without any scale
    T* smoothing_slope = nullptr;  // (rows,) dL/dsmoothing of each row, or null
    SoftmaxGradients gradients;
};

// softmax_stats: the statistics of each row, and later the sweep that carries any upstream gradient back.
template <class T>
struct SoftmaxStatistics {
    SoftmaxInputs<T> inputs;
    T *row_max = nullptr, *row_sum = nullptr;                      // saved for the backward sweep
    T *log_sum_exp = nullptr, *target_logit = nullptr;             // (rows,)
    T *cross_entropy = nullptr, *uniform_cross_entropy = nullptr;  // the second may be null
    T* rest = nullptr;                                             // 1 - p of the label
    int64_t* prediction = nullptr;                                 // may be null
};

template <class T>
struct SoftmaxSweep {
    SoftmaxInputs<T> inputs;
    const T *row_max = nullptr, *row_sum = nullptr, *rest_of_row = nullptr;
    // Upstream gradients of the statistics, each (rows,) or null.
    const T *log_sum_exp = nullptr, *target_logit = nullptr, *cross_entropy = nullptr;
    const T *uniform_cross_entropy = nullptr, *rest = nullptr;
    SoftmaxGradients gradients;
};

}  // namespace fusedloss
