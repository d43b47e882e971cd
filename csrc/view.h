// What the kernels know about a tensor: an address, a data type and strides counted in elements.
#pragma once

#include <cstdint>
#include <cstring>

namespace fusedloss {

enum class DType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

// `label` where it names a class that is not ignored, else -1.
inline int64_t class_or_none(int64_t label, int64_t num_classes, int64_t ignore_index) {
    const bool is_class = static_cast<uint64_t>(label) < static_cast<uint64_t>(num_classes);
    return is_class && label != ignore_index ? label : -1;
}

// Logits or class probabilities: row r = outer * inner_size + inner holds the classes of one sample.
struct View {
    void* data = nullptr;
    DType dtype = DType::float32;
    int64_t outer_size = 0, num_classes = 0, inner_size = 1;
    int64_t outer_stride = 0, class_stride = 1, inner_stride = 0;

    int64_t num_rows() const { return outer_size * inner_size; }
    int64_t row_offset(int64_t row) const {
        if (inner_size == 1) return row * outer_stride;  // a division would take as long as a few vectors
        return (row / inner_size) * outer_stride + (row % inner_size) * inner_stride;
    }
    template <class Element>
    Element* row(int64_t index) const {
        return static_cast<Element*>(data) + row_offset(index);
    }
};

}  // namespace fusedloss
