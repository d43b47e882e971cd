// Arguments of the softmax kernels. T is the type they compute in: float, or double for float64 logits.
#pragma once

#include <cstdint>

#include "view.h"

namespace fusedloss {

// z = scale * c(x) + bias, where c(x) = soft_cap * tanh(x / soft_cap) or x, and the target distribution q:
// everything that a sweep over the rows reads.
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
    double soft_cap = 0;              // 0 for none
    const T* target_override = nullptr;   // (rows,) in place of z at the label, or null
    const T* target_override_grad = nullptr;   // (rows,) d target_override / dx of the label, with target_override
};

// What pulls a row's logits within `margin` of its largest: share * sum_k relu(max z - z_k - margin).
struct HingePenalty {
    double margin = 0, share = 1;
    bool mix = false;  // (1 - strength) * loss + strength * penalty, else loss + strength * penalty
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
    HingePenalty penalty;
    double strength = 0;             // of the penalty
    const T* row_penalty = nullptr;  // (rows,), in place of strength, or null
    double common_scale = 1;         // multiplies the gradient of every row
    const T* row_scale = nullptr;    // (rows,) multiplies a row's loss in the total and its gradient, or null
    T* row_loss = nullptr;           // (rows,), without any scale
    T* smoothing_slope = nullptr;    // (rows,) dL/dsmoothing of each row, or null
    T* label_gradient = nullptr;     // (rows,) dL/dlabel_logit, or null
    T* penalty_slope = nullptr;      // (rows,) dL/dstrength, or null
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
    double penalty_margin = 0;
    T* hinge = nullptr;             // sum_k relu(max z - z_k - penalty_margin), may be null
    int64_t* prediction = nullptr;  // of z without target_override, may be null
    T* confidence = nullptr;        // softmax of z without target_override at the prediction; goes with prediction
};

template <class T>
struct SoftmaxStatisticsBackward {
    SoftmaxInputs<T> inputs;
    const T *row_max = nullptr, *row_sum = nullptr, *rest_of_row = nullptr;
    // Upstream gradients of the statistics, each (rows,) or null.
    const T *log_sum_exp = nullptr, *target_logit = nullptr, *cross_entropy = nullptr;
    const T *uniform_cross_entropy = nullptr, *rest = nullptr, *hinge = nullptr;
    double penalty_margin = 0;
    T* label_gradient = nullptr;  // (rows,) dL/dlabel_logit, or null
    SoftmaxGradients gradients;
};

}  // namespace fusedloss
