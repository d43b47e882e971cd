"""The SIMD levels that the C++ kernels are compiled for, and what a machine without one says."""

LEVELS = ("baseline", "avx2", "avx512")
NOT_ALLOWED = "this processor and build allow baseline and, where present, avx2 and avx512"
