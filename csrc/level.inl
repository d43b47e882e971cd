// Everything that is compiled once per SIMD level. level_<name>.cpp defines FUSEDLOSS_LEVEL (a namespace),
// FUSEDLOSS_VECTOR_BYTES and FUSEDLOSS_FUSED_MULTIPLY_ADD and sets the target after including level.h.

namespace fusedloss {
namespace FUSEDLOSS_LEVEL {

#include "row_math.inl"
#include "rows.inl"
#include "softmax_chunk.inl"
#include "softmax_soft.inl"
#include "softmax_row.inl"
#include "softmax_rows.inl"
#include "softmax_ce.inl"
#include "class_stats.inl"
#include "linear_ce.inl"
#include "supcon.inl"

Kernels table() {
    return {
        {softmax_ce<float>, softmax_stats<float>, softmax_stats_backward<float>},
        {softmax_ce<double>, softmax_stats<double>, softmax_stats_backward<double>},
        {widen_row<float>, class_stats<float>, write_class<float>, update_classes<float>, row_magnitudes<float>},
        {widen_row<double>, class_stats<double>, write_class<double>, update_classes<double>, row_magnitudes<double>},
        {supcon_maxima<float>, supcon_sums<float>, supcon_backward<float>},
        {supcon_maxima<double>, supcon_sums<double>, supcon_backward<double>},
        {row_norms, project_rows<float>, project_rows<double>, target_products, label_gradients<float>,
         label_gradients<double>}};
}

}  // namespace FUSEDLOSS_LEVEL
}  // namespace fusedloss
