// Shared by the binding files.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "view.h"

namespace fusedloss {

void bind_class_stats(pybind11::module_& module);
void bind_linear_ce(pybind11::module_& module);
void bind_softmax_ce(pybind11::module_& module);
void bind_supcon(pybind11::module_& module);

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// (address, dtype, outer, classes, inner, outer stride, class stride, inner stride), or None.
inline View view_of(const pybind11::object& object) {
    View view;
    if (object.is_none()) return view;
    const pybind11::tuple t = pybind11::reinterpret_borrow<pybind11::tuple>(object);
    view.data = pointer<void>(t[0].cast<uintptr_t>());
    view.dtype = static_cast<DType>(t[1].cast<int>());
    view.outer_size = t[2].cast<int64_t>();
    view.num_classes = t[3].cast<int64_t>();
    view.inner_size = t[4].cast<int64_t>();
    view.outer_stride = t[5].cast<int64_t>();
    view.class_stride = t[6].cast<int64_t>();
    view.inner_stride = t[7].cast<int64_t>();
    return view;
}

// Fresh memory costs a page fault per 4 KB, more than writing it; huge pages make that one per 2 MB.
inline void use_huge_pages(const View& view) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr int64_t kWorthwhile = 4 << 20;
    constexpr uintptr_t kPage = 4096;
    const int64_t width = view.dtype == DType::float64 ? 8 : view.dtype == DType::float32 ? 4 : 2;
    const int64_t bytes = view.num_rows() * view.num_classes * width;
    if (!view.data || bytes < kWorthwhile) return;
    const uintptr_t start = (reinterpret_cast<uintptr_t>(view.data) + kPage - 1) / kPage * kPage;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(view.data) + bytes) / kPage * kPage;
    madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#else
    (void)view;
#endif
}

}  // namespace fusedloss
