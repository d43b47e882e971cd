// Arguments of what a linear layer under a softmax needs beside matrix products. T is the type of the gradients.
#pragma once

#include <cstdint>

#include "view.h"

namespace fusedloss {

// Length of each row, squares added in double; infinite for a row of zeros, which has no direction.
struct RowNorms {
    View rows;
    double* norm = nullptr;  // (rows,)
};

// grad -= v <v, grad> / |v|^2, and divided by |v| with `divide`: what normalisation of a row v leaves of the gradient
// of its direction.
template <class T>
struct Projection {
    View rows;
    const double* norm = nullptr;  // (rows,)
    T* grad = nullptr;             // (rows, D)
    bool divide = false;
};

// Row i of `input` against the row of `weight` of its label: their product, or their cosine where norms are given.
struct TargetPairs {
    View input, weight;
    const int64_t* labels = nullptr;
    int64_t ignore_index = -100;
    const double *input_norm = nullptr, *class_norm = nullptr;  // (B,), (K,), both or neither
    double* product = nullptr;                                  // (B,)

    // -1 where the row is ignored: a label that is no class is never read at.
    int64_t label_of(int64_t row) const { return class_or_none(labels[row], weight.num_rows(), ignore_index); }
};

// Adds the gradient of each row's product to those of both.
template <class T>
struct TargetGrads {
    TargetPairs pairs;
    const double* grad_product = nullptr;  // (B,)
    T* input = nullptr;                    // (B, D) or null
    T* weight = nullptr;                   // (K, D) or null
};

}  // namespace fusedloss
