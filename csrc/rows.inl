// What becomes of a row once its sums are known: its loss and the slope that a second sweep writes, in double.
// Twin of fusedloss/core/row_loss.py.

struct RowSums {
    double max = -std::numeric_limits<double>::infinity();
    double rest = 0;     // sum of exp(z - max) over all classes but the label
    double label_z = 0;  // of the label
    double label_exp = 0;
    double reference = 0;    // what the next two are relative to: near the z, so that a common offset costs no digits
    double uniform_z = 0;    // sum of w_j (z_j - reference)
    double soft_z = 0;       // sum of w_j q_j (z_j - reference)
    double soft_weight = 0;  // sum of w_j q_j
    double sum() const { return rest + label_exp; }

    // To another maximum: 0 * exp(-inf - -inf) stays 0, and nothing is computed where nothing changes.
    void rescale(double change) {
        if (change == 0 || std::isnan(change)) return;
        const double factor = std::exp(change);
        rest *= factor;
        label_exp *= factor;
    }
};

// How the slope at a row depends on its statistics; the label's own is folded before anything is rounded.
struct RowSlope {
    double softmax = 0;  // coefficient of p_j
    double uniform = 0;  // coefficient of w_j
    double soft = 0;     // coefficient of w_j q_j
    double label = 0;    // slope at the label, everything included
    double hinge = 0;    // subtracted where z < max - margin, and added as often at the maximum
    int64_t label_index = -1;

    void multiply(double factor) {
        softmax *= factor;
        uniform *= factor;
        soft *= factor;
        label *= factor;
        hinge *= factor;
    }
};

// sum_k relu(max z - z_k - margin) and what its slope needs.
struct HingeSums {
    double sum = 0, threshold = 0, violations = 0;
    int64_t largest = -1;  // the first class with the maximum
    bool label_violates = false;
};

struct RowLoss {
    double loss = 0, smoothing_slope = 0, penalty_slope = 0;
    RowSlope slope;
};

// The options of one row: class weight of the label, smoothing, and what applies to every row alike.
struct RowOptions {
    double label_weight = 1, weight_sum = 0, num_classes = 0;
    double smoothing = 0, focal_gamma = 0, z_loss = 0;
    bool has_uniform = false;  // whether the sums hold uniform_z
    double strength = 0;       // of the penalty
    HingePenalty penalty;
    // What is left of the loss itself beside the penalty.
    double kept() const { return penalty.mix ? 1 - strength : 1; }
};

// Adds the hinge to a row whose slopes already carry options.kept().
inline void add_penalty(const HingeSums& hinge, const RowOptions& options, double log_sum_exp, RowLoss& row) {
    const double penalty = options.penalty.share * hinge.sum;
    const double kept = options.kept();
    row.penalty_slope = options.penalty.mix ? penalty - row.loss : penalty;
    row.loss = kept * row.loss + options.strength * penalty;
    row.smoothing_slope *= kept;
    row.slope.hinge = options.strength * options.penalty.share;
    if (hinge.largest == row.slope.label_index) row.slope.label += row.slope.hinge * hinge.violations;
    if (hinge.label_violates) row.slope.label -= row.slope.hinge;
    row.loss += options.z_loss * log_sum_exp * log_sum_exp;
}

// sum_j weight_j (lse - z_j) from the sum of weight_j (z_j - reference).
inline double cross_entropy_of(double weight, double relative_z, double max, double log_sum, double reference) {
    return weight * (log_sum + (max - reference)) - relative_z;
}

// softmax * p - counted, where drift = softmax - counted: by whichever of p and 1 - p is small and so has all its
// digits.
inline double label_slope(double softmax, double counted, double drift, double p, double rest) {
    return p < 0.5 ? softmax * p - counted : drift - softmax * rest;
}

// loss = (1 - p_y)^gamma * ((1 - eps) * w_y * (lse - z_y) + eps / K * sum_j w_j (lse - z_j)), mixed with the penalty,
// + z_loss * lse^2
inline RowLoss label_row(const RowSums& sums, int64_t label, const RowOptions& options, const HingeSums* hinge) {
    const double max = sums.max == -HUGE_VAL ? 0.0 : sums.max;
    const double sum = sums.sum();
    // A label that is the maximum has exp = 1: log1p keeps the digits of a confident row.
    const double log_sum = sums.label_z == max && sums.rest < 0.5 ? std::log1p(sums.rest) : std::log(sum);
    const double lse = max + log_sum;
    const double per_sum = 1 / sum;
    const double rest = sums.rest * per_sum, p = sums.label_exp * per_sum;
    const double hard = options.label_weight * (log_sum - (sums.label_z - max));
    const double eps = options.smoothing;
    const double share = eps / options.num_classes;
    const double uniform =
        options.has_uniform ? cross_entropy_of(options.weight_sum, sums.uniform_z, max, log_sum, sums.reference) : 0.0;

    RowLoss row;
    const double mixed = eps == 0 ? hard : (1 - eps) * hard + share * uniform;
    double focus = 1, focus_slope = 0;
    if (options.focal_gamma != 0) {
        focus = std::pow(rest, options.focal_gamma);
        // p log p -> 0 with p, and (1 - p)^gamma / (1 - p) only ever multiplies terms that vanish with 1 - p.
        if (p > 0 && rest > 0) focus_slope = options.focal_gamma * focus / rest * p * mixed;
    }
    row.loss = focus * mixed;
    row.smoothing_slope = focus * (uniform / options.num_classes - hard);
    row.slope.label_index = label;
    const double kept = options.kept();
    row.slope.uniform = kept * focus * share;
    const double drift = row.slope.uniform * options.weight_sum + 2 * options.z_loss * lse;
    const double counted = kept * (focus * (1 - eps) * options.label_weight + focus_slope);
    row.slope.softmax = counted + drift;
    row.slope.label =
        label_slope(row.slope.softmax, counted, drift, p, rest) - row.slope.uniform * options.label_weight;
    if (hinge) add_penalty(*hinge, options, lse, row);
    else row.loss += options.z_loss * lse * lse;
    return row;
}

// loss = sum_j w_j ((1 - eps) q_j + eps / K) (lse - z_j), mixed with the penalty, + z_loss * lse^2
inline RowLoss soft_row(const RowSums& sums, const RowOptions& options, const HingeSums* hinge) {
    const double max = sums.max == -HUGE_VAL ? 0.0 : sums.max;
    const double log_sum = std::log(sums.sum());
    const double lse = max + log_sum;
    const double eps = options.smoothing;
    const double share = eps / options.num_classes;
    const double soft = cross_entropy_of(sums.soft_weight, sums.soft_z, max, log_sum, sums.reference);
    const double uniform =
        options.has_uniform ? cross_entropy_of(options.weight_sum, sums.uniform_z, max, log_sum, sums.reference) : 0.0;

    RowLoss row;
    row.loss = eps == 0 ? soft : (1 - eps) * soft + share * uniform;
    row.smoothing_slope = uniform / options.num_classes - soft;
    const double kept = options.kept();
    row.slope.uniform = kept * share;
    row.slope.soft = kept * (1 - eps);
    row.slope.softmax =
        row.slope.soft * sums.soft_weight + row.slope.uniform * options.weight_sum + 2 * options.z_loss * lse;
    if (hinge) add_penalty(*hinge, options, lse, row);
    else row.loss += options.z_loss * lse * lse;
    return row;
}
