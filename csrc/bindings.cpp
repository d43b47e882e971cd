// The only file that knows Python, with bind_<stem>.cpp: tensors arrive as addresses, shapes and strides.
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "kernels.h"
#include "parallel.h"

PYBIND11_MODULE(_C, module) {
    module.doc() = "Compiled kernels of fusedloss for CPUs.";
    module.def("level", &fusedloss::simd_level, "The SIMD level in use: baseline, avx2 or avx512.");
    module.def("has_openmp", &fusedloss::has_openmp, "Whether the kernels were built with OpenMP threads.");
    fusedloss::bind_class_stats(module);
    fusedloss::bind_linear_ce(module);
    fusedloss::bind_softmax_ce(module);
    fusedloss::bind_supcon(module);
}
