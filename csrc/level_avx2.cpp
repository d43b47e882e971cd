// x86-64 with AVX2 and FMA.
#include "level.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define FUSEDLOSS_LEVEL avx2
#define FUSEDLOSS_VECTOR_BYTES 32
#define FUSEDLOSS_FUSED_MULTIPLY_ADD 1
#include "level.inl"
#endif
