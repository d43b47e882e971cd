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

// gradient -= v <v, gradient> / |v|^2, and divided by |v| where asked: what normalisation of a row v leaves of the
// gradient of its direction.
template <class T>
struct Projection {
    View rows;
    const double* norm = nullptr;  // (rows,)
    T* gradient = nullptr;         // (rows, D)
    bool divide = false;
};

// Row i of `input` against row label_i of `weight`: their product, or their cosine where norms are given.
struct LabelPairs {
    View input, weight;
    const int64_t* labels = nullptr;
    int64_t ignore_index = -100;
    const double *input_norm = nullptr, *weight_norm = nullptr;  // (B,), (K,), both or neither
    double* product = nullptr;                                   // (B,)
};

// Adds dL/dproduct of each row to the gradients of both.
template <class T>
struct LabelGradients {
    LabelPairs pairs;
    const double* slope = nullptr;  // (B,) dL/dproduct
    T* input = nullptr;             // (B, D) or null
    T* weight = nullptr;            // (K, D) or null
};

}  // namespace fusedloss
