// The options of a row's loss: twin of RowOptions in fusedloss/core/row_loss.py, field by field in the same order.
#pragma once

#include <cstddef>

// Each option and its default; 0 turns one off. What an option does is said in row_loss.inl.
#define FUSEDLOSS_ROW_OPTIONS(OPTION) \
    OPTION(label_smoothing, 0.0)      \
    OPTION(focal_gamma, 0.0)          \
    OPTION(poly_epsilon, 0.0)         \
    OPTION(z_loss, 0.0)               \
    OPTION(penalty_margin, 0.0)       \
    OPTION(penalty_strength, 0.0)     \
    OPTION(penalty_scale, 1.0)        \
    OPTION(penalty_mix, 0.0)

namespace fusedloss {

struct RowOptions {
#define FUSEDLOSS_FIELD(name, value) double name = value;
    FUSEDLOSS_ROW_OPTIONS(FUSEDLOSS_FIELD)
#undef FUSEDLOSS_FIELD
};

#define FUSEDLOSS_COUNT(name, value) +1
constexpr std::size_t kNumRowOptions = FUSEDLOSS_ROW_OPTIONS(FUSEDLOSS_COUNT);
#undef FUSEDLOSS_COUNT

}  // namespace fusedloss
