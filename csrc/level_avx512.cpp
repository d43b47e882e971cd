// x86-64 with AVX-512 F, BW, DQ and VL.
#include "level.h"

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#define FUSEDLOSS_LEVEL avx512
#define FUSEDLOSS_VECTOR_BYTES 64
#define FUSEDLOSS_FUSED_MULTIPLY_ADD 1
#include "level.inl"
#endif
