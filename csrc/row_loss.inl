// From the sums over a row to its loss and the coefficients of its gradient, in double. Twin of
// fusedloss/core/row_loss.py.

// What a sweep over the classes adds up.
struct RowSums {
    double max = -std::numeric_limits<double>::infinity();
    double other_sum = 0;    // sum of exp(z - max) over all classes but the label
    double label_z = 0;      // z of the label
    double label_exp = 0;    // exp(z - max) of the label
    double reference = 0;    // what the next two are relative to: near the z, so that a common offset costs no digits
    double smooth_z = 0;     // sum of w_j (z_j - reference)
    double soft_z = 0;       // sum of w_j q_j (z_j - reference)
    double soft_weight = 0;  // sum of w_j q_j
    bool has_smooth_z = false;
    double sum() const { return other_sum + label_exp; }

    // To another maximum: 0 * exp(-inf - -inf) stays 0, and nothing is computed where nothing changes.
    void rescale(double change) {
        if (change == 0 || std::isnan(change)) return;
        const double factor = std::exp(change);
        other_sum *= factor;
        label_exp *= factor;
    }
};

// sum_k relu(max z - z_k - margin) and what its gradient needs.
struct HingeSums {
    double sum = 0, threshold = 0, violations = 0;
    int64_t largest = -1;  // the first class with the maximum
    bool label_violates = false;
};

// What the target says of a row: a label, or probabilities q.
struct RowTarget {
    int64_t label = -1;       // negative for probabilities
    double label_weight = 1;  // class weight of the label
    double soft_weight = 0;   // sum of w_j q_j
    double weight_sum = 0;    // sum of w_j
    double num_classes = 0;
};

// What a row's loss is a function of; see Statistics in core/row_loss.py.
struct RowStatistics {
    double log_sum_exp = 0, target_logit = 0, cross_entropy = 0, smooth_loss = 0, one_minus_pt = 0, hinge = 0;
    double pt = 0;  // of the label, beside 1 - pt: whichever is small has all its digits
};

// A row's loss, its derivatives in the statistics, and those in what may differ from row to row.
struct RowPartials {
    double loss = 0;
    double log_sum_exp = 0, target_logit = 0, cross_entropy = 0, smooth_loss = 0, one_minus_pt = 0, hinge = 0;
    double label_smoothing = 0, penalty_strength = 0;
};

// dL/dz_j = softmax p_j - smooth_loss w_j - soft w_j q_j - [z_j < max - margin] hinge + [j is the largest] largest,
// and `label` at the label, everything included: folded before anything is rounded.
struct GradCoefficients {
    double softmax = 0, smooth_loss = 0, soft = 0, hinge = 0, largest = 0, label = 0;

    void multiply(double factor) {
        softmax *= factor;
        smooth_loss *= factor;
        soft *= factor;
        hinge *= factor;
        largest *= factor;
        label *= factor;
    }
};

// sum_j weight_j (lse - z_j) from the sum of weight_j (z_j - reference).
inline double weighted_cross_entropy(double weight, double relative_z, double log_sum, const RowSums& sums,
                                     double max) {
    return weight * (log_sum + (max - sums.reference)) - relative_z;
}

inline RowStatistics row_statistics(const RowSums& sums, const RowTarget& target) {
    RowStatistics row;
    const double max = sums.max == -HUGE_VAL ? 0.0 : sums.max;
    const double sum = sums.sum();
    // A label that is the maximum has exp = 1: log1p keeps the digits of a confident row.
    const bool confident = target.label >= 0 && sums.label_z == max && sums.other_sum < 0.5;
    const double log_sum = confident ? std::log1p(sums.other_sum) : std::log(sum);
    row.log_sum_exp = max + log_sum;
    if (sums.has_smooth_z)
        row.smooth_loss = weighted_cross_entropy(target.weight_sum, sums.smooth_z, log_sum, sums, max);
    if (target.label >= 0) {
        const double per_sum = 1 / sum;
        row.pt = sums.label_exp * per_sum;
        row.one_minus_pt = sums.other_sum * per_sum;
        row.target_logit = sums.label_z;
        row.cross_entropy = target.label_weight * (log_sum - (sums.label_z - max));
    } else {
        row.target_logit = sums.soft_z + sums.soft_weight * sums.reference;
        row.cross_entropy = weighted_cross_entropy(sums.soft_weight, sums.soft_z, log_sum, sums, max);
    }
    return row;
}

// (1 - p_y)^focal_gamma * ((1 - label_smoothing) * cross_entropy + label_smoothing / K * smooth_loss)
//     + poly_epsilon * (1 - p_y), mixed with or added to the penalty, + z_loss * lse^2
inline RowPartials row_loss(const RowStatistics& row, const RowOptions& options, double num_classes) {
    RowPartials partials;
    const double smoothing = options.label_smoothing, share = smoothing / num_classes;
    double loss = smoothing == 0 ? row.cross_entropy : (1 - smoothing) * row.cross_entropy + share * row.smooth_loss;
    double focus = 1;
    if (options.focal_gamma != 0) {
        // A row with p_y = 1 has loss 0 and gradient 0; the power alone would have an infinite one below gamma = 1.
        const bool certain = row.one_minus_pt == 0;
        focus = certain ? 0 : std::pow(row.one_minus_pt, options.focal_gamma);
        partials.one_minus_pt = certain ? 0 : options.focal_gamma * focus / row.one_minus_pt * loss;
        loss = certain ? 0 : focus * loss;
    }
    loss += options.poly_epsilon * row.one_minus_pt;
    partials.one_minus_pt += options.poly_epsilon;
    const bool mix = options.penalty_mix != 0;
    const double penalty = options.penalty_scale * row.hinge, kept = mix ? 1 - options.penalty_strength : 1;
    partials.cross_entropy = kept * focus * (1 - smoothing);
    partials.smooth_loss = kept * focus * share;
    partials.one_minus_pt *= kept;
    partials.hinge = options.penalty_strength * options.penalty_scale;
    partials.label_smoothing = kept * focus * (row.smooth_loss / num_classes - row.cross_entropy);
    partials.penalty_strength = mix ? penalty - loss : penalty;
    partials.log_sum_exp = 2 * options.z_loss * row.log_sum_exp;
    partials.loss =
        kept * loss + options.penalty_strength * penalty + options.z_loss * row.log_sum_exp * row.log_sum_exp;
    return partials;
}

// The only place where derivatives in statistics become coefficients of the gradient in z; `hinge` where that has one.
inline GradCoefficients grad_coefficients(const RowPartials& partials, const RowStatistics& row,
                                          const RowTarget& target, const HingeSums* hinge) {
    GradCoefficients grad;
    grad.smooth_loss = partials.smooth_loss;
    const double of_all = partials.log_sum_exp + partials.smooth_loss * target.weight_sum;
    if (target.label < 0) {
        grad.softmax = of_all + partials.cross_entropy * target.soft_weight;
        grad.soft = partials.cross_entropy - partials.target_logit;
    } else {
        // d(1 - p_y)/dz is in proportion to p_y: p log p -> 0 with p, where the derivative in 1 - p_y is infinite.
        const double focus = std::isfinite(partials.one_minus_pt) ? partials.one_minus_pt * row.pt : 0.0;
        const double of_target = target.label_weight * partials.cross_entropy + focus;
        const double target_coeff = of_target - partials.target_logit;
        grad.softmax = of_all + of_target;
        // By whichever of p and 1 - p is small and so has all its digits: softmax - target_coeff is formed without
        // cancellation.
        grad.label = row.pt < 0.5 ? grad.softmax * row.pt - target_coeff
                                  : of_all + partials.target_logit - grad.softmax * row.one_minus_pt;
        grad.label -= target.label_weight * partials.smooth_loss;
    }
    if (!hinge) return grad;
    grad.hinge = partials.hinge;
    grad.largest = partials.hinge * hinge->violations;
    if (hinge->largest == target.label) grad.label += grad.largest;
    if (hinge->label_violates) grad.label -= grad.hinge;
    return grad;
}
