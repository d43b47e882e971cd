// Arguments of the softmax kernels, as fusedloss/core/operands.py names them. T is the type they compute in: float, or
// double for float64 logits.
#pragma once

#include <cstdint>

#include "row_options.h"
#include "view.h"

namespace fusedloss {

// z = scale * c(x) + bias, where c(x) = soft_cap * tanh(x / soft_cap) or x, and the target distribution q:
// everything that a sweep over the rows reads.
template <class T>
struct LogitInputs {
    View logits;
    View probabilities;                       // soft targets; data is null with labels
    const int64_t* labels = nullptr;          // (rows,); null with soft targets
    const T* scale = nullptr;                 // (K,) or null
    const T* bias = nullptr;                  // (K,) or null
    const T* class_weight = nullptr;          // (K,) or null
    const T* target_override = nullptr;       // (rows,) in place of z at the label, or null
    const T* target_override_grad = nullptr;  // (rows,) d target_override / dx of the label, with target_override
    double soft_cap = 0;                      // 0 for none
    int64_t ignore_index = -100;
    double weight_sum = 0;  // sum of class_weight, K without

    // The row's class; -1 with probabilities, and where the row is ignored: a label that is no class is never read at.
    int64_t label_of(int64_t row) const {
        return labels ? class_or_none(labels[row], logits.num_classes, ignore_index) : -1;
    }
    bool is_ignored(int64_t label) const { return labels && label < 0; }
    double weight_of(int64_t label) const { return label >= 0 && class_weight ? class_weight[label] : 1.0; }
};

// One value per row, or null; the first and the last replace the option of the same name.
template <class T>
struct RowInputs {
    const T* label_smoothing = nullptr;
    const T* sample_weight = nullptr;  // multiplies a row's loss in the total and its gradient
    const T* penalty_strength = nullptr;
};

// Where gradients go; null for what is not needed.
template <class T>
struct SoftmaxGrads {
    View logits;
    double* scale_bias = nullptr;  // (threads, 2, K) column sums dL/dscale and dL/dbias of each thread
    // (rows,)
    T *target_override = nullptr, *label_smoothing = nullptr, *penalty_strength = nullptr;
};

// softmax_ce: one read of the logits gives the loss of each row and its gradient.
template <class T>
struct SoftmaxCE {
    LogitInputs<T> inputs;
    RowInputs<T> rows;
    RowOptions options;
    double loss_scale = 1;  // multiplies the gradient of every row
    T* row_loss = nullptr;  // (rows,), without any scale
    SoftmaxGrads<T> grads;

    bool needs_smooth_loss() const {
        return options.label_smoothing != 0 || rows.label_smoothing || grads.label_smoothing;
    }
    bool needs_hinge() const {
        return options.penalty_strength != 0 || rows.penalty_strength || grads.penalty_strength;
    }
};

// softmax_stats: the statistics of each row, (rows,) each.
template <class T>
struct SoftmaxStatistics {
    LogitInputs<T> inputs;
    double penalty_margin = 0;
    T *row_max = nullptr, *row_sum = nullptr;  // kept for the backward
    T *log_sum_exp = nullptr, *target_logit = nullptr, *cross_entropy = nullptr;
    T* smooth_loss = nullptr;  // may be null
    T* one_minus_pt = nullptr;
    T* hinge = nullptr;             // may be null
    int64_t* prediction = nullptr;  // of z without target_override, may be null
    T* confidence = nullptr;        // softmax of z without target_override at the prediction; goes with prediction
};

template <class T>
struct SavedStatistics {
    const T *row_max = nullptr, *row_sum = nullptr, *one_minus_pt = nullptr;
};

// Upstream gradients of the statistics, (rows,) each or null.
template <class T>
struct StatisticsGrads {
    const T *log_sum_exp = nullptr, *target_logit = nullptr, *cross_entropy = nullptr;
    const T *smooth_loss = nullptr, *one_minus_pt = nullptr, *hinge = nullptr;
};

// softmax_stats_backward: carries them to the inputs.
template <class T>
struct SoftmaxStatisticsBackward {
    LogitInputs<T> inputs;
    SavedStatistics<T> saved;
    StatisticsGrads<T> upstream;
    double penalty_margin = 0;
    SoftmaxGrads<T> grads;
};

}  // namespace fusedloss
