// One formula text, compiled for the baseline of the ABI and for each SIMD level that a processor may have.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

#define FUSEDLOSS_LEVEL baseline
#define FUSEDLOSS_VECTOR_BYTES 16
#define FUSEDLOSS_FUSED_MULTIPLY_ADD 0
#include "level.inl"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define FUSEDLOSS_LEVEL avx2
#define FUSEDLOSS_VECTOR_BYTES 32
#define FUSEDLOSS_FUSED_MULTIPLY_ADD 1
#include "level.inl"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#define FUSEDLOSS_LEVEL avx512
#define FUSEDLOSS_VECTOR_BYTES 64
#define FUSEDLOSS_FUSED_MULTIPLY_ADD 1
#include "level.inl"
#pragma GCC pop_options
#endif

namespace fusedloss {
namespace {

Kernels pick() {
    const char* wanted = std::getenv("FUSEDLOSS_SIMD");
    const std::string level = wanted ? wanted : "";
#if defined(__x86_64__)
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (has_avx512 && (level.empty() || level == "avx512")) return avx512::table("avx512");
    if (has_avx2 && (level.empty() || level == "avx2")) return avx2::table("avx2");
#endif
    if (level.empty() || level == "baseline") return baseline::table("baseline");
    throw std::runtime_error("FUSEDLOSS_SIMD: got '" + level +
                             "'; this processor and build allow baseline and, where present, avx2 and avx512");
}

}  // namespace

const Kernels& kernels() {
    static const Kernels chosen = pick();
    return chosen;
}

}  // namespace fusedloss
