// Everything that is compiled once per SIMD level. No include guard: levels.cpp includes it once per level.

namespace fusedloss {
namespace FUSEDLOSS_LEVEL {

#include "row_math.inl"
#include "rows.inl"
#include "softmax_ce.inl"
#include "class_stats.inl"

inline Kernels table(const char* level) {
    return {level,
            {softmax_ce<float>, softmax_stats<float>, softmax_sweep<float>},
            {softmax_ce<double>, softmax_stats<double>, softmax_sweep<double>},
            {widen_row<float>, class_stats<float>, write_class<float>},
            {widen_row<double>, class_stats<double>, write_class<double>}};
}

}  // namespace FUSEDLOSS_LEVEL
}  // namespace fusedloss

#undef FUSEDLOSS_LEVEL
#undef FUSEDLOSS_VECTOR_BYTES
#undef FUSEDLOSS_FUSED_MULTIPLY_ADD
