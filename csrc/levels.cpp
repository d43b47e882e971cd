// Picks the SIMD level for this machine; FUSEDLOSS_SIMD forces one.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fusedloss {
namespace {

struct Chosen {
    const char* level;
    Kernels kernels;
};

Chosen pick() {
    const char* wanted = std::getenv("FUSEDLOSS_SIMD");
    const std::string level = wanted ? wanted : "";
#if defined(__x86_64__)
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (has_avx512 && (level.empty() || level == "avx512")) return {"avx512", avx512::table()};
    if (has_avx2 && (level.empty() || level == "avx2")) return {"avx2", avx2::table()};
#endif
    if (level.empty() || level == "baseline") return {"baseline", baseline::table()};
    throw std::runtime_error("FUSEDLOSS_SIMD: got '" + level +
                             "'; this processor and build allow baseline and, where present, avx2 and avx512");
}

const Chosen& chosen() {
    static const Chosen choice = pick();
    return choice;
}

}  // namespace

const Kernels& kernels() { return chosen().kernels; }

const char* simd_level() { return chosen().level; }

}  // namespace fusedloss
