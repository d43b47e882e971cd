// softmax_ce, softmax_stats and softmax_stats_backward: what each does with a row. Twin of
// fusedloss/backends/reference/softmax_ce.py.

template <class Out>
inline void zero_row(Out* gradient, int64_t count) {
    if (gradient) std::memset(static_cast<void*>(gradient), 0, count * sizeof(Out));
}

template <class T, class In>
void ignore_row(const SoftmaxCE<T>& call, int64_t row, In* gradient) {
    call.row_loss[row] = 0;
    if (call.smoothing_slope) call.smoothing_slope[row] = 0;
    if (call.penalty_slope) call.penalty_slope[row] = 0;
    if (call.label_gradient) call.label_gradient[row] = 0;
    zero_row(gradient, call.inputs.logits.num_classes);
}

template <class T>
RowOptions options_of(const SoftmaxCE<T>& call, int64_t row) {
    const SoftmaxInputs<T>& inputs = call.inputs;
    RowOptions options;
    options.label_weight = inputs.labels && inputs.class_weight ? inputs.class_weight[inputs.labels[row]] : 1.0;
    options.weight_sum = inputs.weight_sum;
    options.num_classes = inputs.logits.num_classes;
    options.smoothing = call.row_smoothing ? call.row_smoothing[row] : call.smoothing;
    options.focal_gamma = call.focal_gamma;
    options.z_loss = call.z_loss;
    options.has_uniform = options.smoothing != 0 || call.row_smoothing || call.smoothing_slope;
    options.penalty = call.penalty;
    options.strength = call.row_penalty ? call.row_penalty[row] : call.strength;
    return options;
}

// Records a row's loss and what is wanted per row; returns the slope of the whole loss there.
template <class T>
RowSlope finish_row(const SoftmaxCE<T>& call, int64_t row, int64_t label, const RowSums& sums, const HingeSums* hinge) {
    const RowOptions options = options_of(call, row);
    RowLoss result = call.inputs.labels ? label_row(sums, label, options, hinge) : soft_row(sums, options, hinge);
    const double scale = call.common_scale * (call.row_scale ? call.row_scale[row] : 1.0);
    call.row_loss[row] = T(result.loss);
    if (call.smoothing_slope) call.smoothing_slope[row] = T(scale * result.smoothing_slope);
    if (call.penalty_slope) call.penalty_slope[row] = T(scale * result.penalty_slope);
    result.slope.multiply(scale);
    if (call.label_gradient) call.label_gradient[row] = T(result.slope.label);
    return result.slope;
}

template <class T>
struct CrossEntropyRow {
    const SoftmaxCE<T>& call;

    template <class Sweep, class In>
    void operator()(Sweep& sweep, const In* x, int64_t row, T* e, In* gradient) const {
        const SoftmaxInputs<T>& inputs = call.inputs;
        const int64_t label = inputs.labels ? inputs.labels[row] : -1;
        if (inputs.labels && label == inputs.ignore_index) return ignore_row(call, row, gradient);
        const bool want_uniform = call.smoothing != 0 || call.row_smoothing || call.smoothing_slope;
        const RowSums sums = sweep.read(x, row, want_uniform, e);
        HingeSums hinge_sums;
        const HingeSums* hinge = nullptr;
        if (call.strength != 0 || call.row_penalty) {
            hinge_sums = sweep.hinge(x, row, sums.max, call.penalty.margin);
            hinge = &hinge_sums;
        }
        const RowSlope slope = finish_row(call, row, label, sums, hinge);
        if (!gradient && !call.gradients.scale_bias) return;
        sweep.write(x, row, slope, sums.max, sums.sum(), hinge, e, gradient);
    }
};

#include "softmax_short.inl"

template <class T>
void softmax_ce(const SoftmaxCE<T>& call, int64_t first, int64_t last, int thread) {
    if (is_short(call)) return short_rows<T>(call, first, last);
    const CrossEntropyRow<T> per_row{call};
    dispatch_logits<T>(call.inputs, call.gradients, per_row, first, last, thread);
}

template <class T>
struct StatisticsRow {
    const SoftmaxStatistics<T>& call;

    template <class Sweep, class In>
    void operator()(Sweep& sweep, const In* x, int64_t row, T*, In*) const {
        const SoftmaxInputs<T>& inputs = call.inputs;
        const bool ignored = inputs.labels && inputs.labels[row] == inputs.ignore_index;
        const bool want_uniform = call.uniform_cross_entropy && !ignored;
        const RowSums sums = sweep.read(x, row, want_uniform, nullptr);
        RowOptions options;
        options.num_classes = inputs.logits.num_classes;
        const int64_t label = inputs.labels && !ignored ? inputs.labels[row] : -1;
        options.label_weight = label >= 0 && inputs.class_weight ? inputs.class_weight[label] : 1.0;
        const double max = sums.max == -HUGE_VAL ? 0.0 : sums.max;
        const double log_sum = std::log(sums.sum());
        call.row_max[row] = T(sums.max);
        call.row_sum[row] = T(sums.sum());
        call.log_sum_exp[row] = T(max + log_sum);
        if (call.hinge) call.hinge[row] = ignored ? T(0) : T(sweep.hinge(x, row, sums.max, call.penalty_margin).sum);
        if (call.prediction) {
            const auto top = sweep.prediction(x, row, sums);
            call.prediction[row] = top.index;
            call.confidence[row] = T(top.confidence);
        }
        call.target_logit[row] =
            ignored ? T(0) : T(inputs.labels ? sums.label_z : sums.soft_z + sums.soft_weight * sums.reference);
        call.cross_entropy[row] =
            ignored
                ? T(0)
                : T((inputs.labels ? label_row(sums, label, options, nullptr) : soft_row(sums, options, nullptr)).loss);
        call.rest[row] = label >= 0 ? T(sums.rest / sums.sum()) : T(0);
        if (call.uniform_cross_entropy)
            call.uniform_cross_entropy[row] =
                ignored ? T(0) : T(cross_entropy_of(inputs.weight_sum, sums.uniform_z, max, log_sum, sums.reference));
    }
};

template <class T>
struct SweepRow {
    const SoftmaxStatisticsBackward<T>& call;

    template <class Sweep, class In>
    void operator()(Sweep& sweep, const In* x, int64_t row, T*, In* gradient) const {
        const SoftmaxInputs<T>& inputs = call.inputs;
        const bool ignored = inputs.labels && inputs.labels[row] == inputs.ignore_index;
        const double max = call.row_max[row], sum = call.row_sum[row];
        const double lse = upstream(call.log_sum_exp, row);
        RowSlope slope;
        slope.softmax = lse;
        if (ignored && call.label_gradient) call.label_gradient[row] = 0;
        // Nothing asks for an ignored row's gradient, unless its log_sum_exp was used: NaN logits there stay there.
        if (ignored && lse == 0) return zero_row(gradient, inputs.logits.num_classes);
        if (ignored) return sweep.write(x, row, slope, max, sum, nullptr, nullptr, gradient);
        const double logit = upstream(call.target_logit, row);
        const double cross_entropy = upstream(call.cross_entropy, row);
        slope.uniform = upstream(call.uniform_cross_entropy, row);
        slope.softmax += slope.uniform * inputs.weight_sum;
        if (inputs.labels) {
            const int64_t label = inputs.labels[row];
            const double weight = inputs.class_weight ? inputs.class_weight[label] : 1.0;
            const double rest = call.rest_of_row[row];
            const double p = sweep.probability(x, row, label, max, sum);
            double rest_slope = upstream(call.rest, row);
            rest_slope = std::isfinite(rest_slope) ? rest_slope * p : 0.0;
            const double counted = weight * cross_entropy + rest_slope - logit;
            const double drift = slope.softmax + logit;
            slope.label_index = label;
            slope.softmax += weight * cross_entropy + rest_slope;
            slope.label = label_slope(slope.softmax, counted, drift, p, rest) - weight * slope.uniform;
        } else {
            slope.softmax += sweep.soft_weight(row) * cross_entropy;
            slope.soft = cross_entropy - logit;
        }
        HingeSums hinge;
        slope.hinge = upstream(call.hinge, row);
        if (slope.hinge != 0) {
            hinge = sweep.hinge(x, row, max, call.penalty_margin);
            if (hinge.largest == slope.label_index) slope.label += slope.hinge * hinge.violations;
            if (hinge.label_violates) slope.label -= slope.hinge;
        }
        if (call.label_gradient) call.label_gradient[row] = T(slope.label);
        sweep.write(x, row, slope, max, sum, &hinge, nullptr, gradient);
    }

    static double upstream(const T* gradient, int64_t row) { return gradient ? double(gradient[row]) : 0.0; }
};

template <class T>
void softmax_stats(const SoftmaxStatistics<T>& call, int64_t first, int64_t last, int thread) {
    const StatisticsRow<T> per_row{call};
    dispatch_logits<T>(call.inputs, SoftmaxGradients(), per_row, first, last, thread);
}

template <class T>
void softmax_stats_backward(const SoftmaxStatisticsBackward<T>& call, int64_t first, int64_t last, int thread) {
    const SweepRow<T> per_row{call};
    dispatch_logits<T>(call.inputs, call.gradients, per_row, first, last, thread);
}
