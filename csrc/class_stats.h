// Arguments of the class_stats kernels. T is the type of shift and results: float, or double for double features.
#pragma once

#include <cstdint>

#include "view.h"

namespace fusedloss {

// A row with a value that is not finite, or larger than this, is left out: one such row would spoil a running statistic
// for good. Twin of LARGEST_VALUE in backends/reference/class_stats.py.
constexpr double kLargestValue = 1125899906842624.0;  // 2^50

// Rows order[first] .. order[last - 1], all of one class. A long class has several segments, whose sums wait in slots
// `partial` and up to be added in order; -1 marks the only segment of a class, which may be empty.
struct ClassSegment {
    int64_t label = 0, first = 0, last = 0;
    int64_t partial = -1;
    int64_t skipped = 0;  // written by the kernel: rows that were left out
};

template <class T>
struct ClassStats {
    View features;  // outer = rows, classes = features of a row, contiguous
    bool per_feature = false;
    const int64_t* order = nullptr;  // rows kept, class by class, in the order of the batch within a class
    int64_t num_kept = 0;
    ClassSegment* segments = nullptr;
    T* shift = nullptr;          // (K, width)
    T* sum = nullptr;            // (K, width)
    T* square = nullptr;         // (K,) or (K, width)
    double* partials = nullptr;  // slots, each of width sums, then one square or width of them
    double* scratch = nullptr;   // one slot for each thread

    int64_t width() const { return features.num_classes; }
    int64_t num_squares() const { return per_feature ? width() : 1; }
    int64_t slot_size() const { return width() + num_squares(); }
};

// Running statistics and the sums of class_stats over a batch; see backends/reference/class_stats.py for the formulas.
template <class T>
struct ClassStatsUpdate {
    int64_t width = 0;
    double momentum = 0;  // negative: every row counts the same
    int64_t* count = nullptr;
    T* mean = nullptr;          // (K, width)
    double* scatter = nullptr;  // (K,)
    T* variance = nullptr;      // (K, width) or null
    const int64_t* rows = nullptr;
    const T* shift = nullptr;                   // (K, width); may be mean
    const T *sum = nullptr, *square = nullptr;  // of deviations
};

// Sum of |x| of each row.
template <class T>
struct RowMagnitudes {
    View rows;
    T* sum = nullptr;  // (rows,)
};

}  // namespace fusedloss
