// Arguments of the supcon kernels. T is the type they compute in: float, or double for double features.
#pragma once

#include <cstdint>

namespace fusedloss {

// Columns whose sums one call of the sums kernel keeps in the first-level cache.
constexpr int64_t kSupConTileColumns = 1024;

// Similarities of the rows first .. first + rows - 1 with the columns first .. first + columns - 1. Only those above
// the diagonal count: with j > i, s_ij stands for both directions. Arrays of one value per column are indexed from 0.
template <class T>
struct SupConPanel {
    T* similarity = nullptr;  // (rows, columns); the backward overwrites it with gradients
    int64_t first = 0, rows = 0, columns = 0;
    // Positives: columns with the row's code, or the bytes of a mask, (rows, columns) for each direction.
    const int32_t* codes = nullptr;
    const uint8_t* mask = nullptr;       // whether column j is a positive of row i
    const uint8_t* mask_back = nullptr;  // whether row i is a positive of column j
    // exp is taken of s - shift: one number, or the largest similarity of each row (null for the number; finite
    // for columns that are no anchors).
    T common_shift = 0;
    T* row_shift = nullptr;
    // Weight of a column in sums of exp, as a negative and as a positive, and in the mean over positives; null for 1.
    const T *negative_weight = nullptr, *positive_weight = nullptr, *share = nullptr;

    int64_t last() const { return first + columns; }
    T* row(int64_t index) const { return similarity + (index - first) * columns; }
};

// What a pass over panels adds up, one value per row: sum of w exp(s - shift), sum of q (s - shift) over positives.
struct SupConSums {
    double *exponentials = nullptr, *positives = nullptr;
};

// Of each row, in the gradient of a pair's similarity, in both directions:
// dL/ds_ij + dL/ds_ji = exp(s - shift_i) softmax_i w_j + exp(s - shift_j) softmax_j w_i
//                       - [positive] (positive_i q_j + positive_j q_i)
template <class T>
struct SupConCoefficients {
    const T *softmax = nullptr, *positive = nullptr;
};

}  // namespace fusedloss
