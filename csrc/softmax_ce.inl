// softmax_ce, softmax_stats and softmax_stats_backward: what each does with a row. Twin of
// fusedloss/backends/reference/softmax_ce.py.

template <class Out>
inline void zero_row(Out* gradient, int64_t count) {
    if (gradient) std::memset(static_cast<void*>(gradient), 0, count * sizeof(Out));
}

template <class T, class In>
void ignore_row(const SoftmaxCE<T>& call, int64_t row, In* gradient) {
    call.row_loss[row] = 0;
    if (call.grads.label_smoothing) call.grads.label_smoothing[row] = 0;
    if (call.grads.penalty_strength) call.grads.penalty_strength[row] = 0;
    if (call.grads.target_override) call.grads.target_override[row] = 0;
    zero_row(gradient, call.inputs.logits.num_classes);
}

template <class T>
RowTarget target_of(const LogitInputs<T>& inputs, int64_t label, double soft_weight) {
    return {label, inputs.weight_of(label), soft_weight, inputs.weight_sum, double(inputs.logits.num_classes)};
}

// Those of a row: what its own tensors say in place of the numbers for all.
template <class T>
RowOptions options_of(const SoftmaxCE<T>& call, int64_t row) {
    RowOptions options = call.options;
    if (call.rows.label_smoothing) options.label_smoothing = call.rows.label_smoothing[row];
    if (call.rows.penalty_strength) options.penalty_strength = call.rows.penalty_strength[row];
    return options;
}

// Records a row's loss and what is needed per row; returns the coefficients of the whole loss's gradient there.
template <class T>
GradCoefficients finish_row(const SoftmaxCE<T>& call, int64_t row, int64_t label, const RowSums& sums,
                            const RowOptions& options, const HingeSums* hinge) {
    const RowTarget target = target_of(call.inputs, label, sums.soft_weight);
    RowStatistics statistics = row_statistics(sums, target);
    if (hinge) statistics.hinge = hinge->sum;
    const RowPartials partials = row_loss(statistics, options, target.num_classes);
    GradCoefficients coeffs = grad_coefficients(partials, statistics, target, hinge);
    const double scale = call.loss_scale * (call.rows.sample_weight ? call.rows.sample_weight[row] : 1.0);
    coeffs.multiply(scale);
    call.row_loss[row] = T(partials.loss);
    if (call.grads.label_smoothing) call.grads.label_smoothing[row] = T(scale * partials.label_smoothing);
    if (call.grads.penalty_strength) call.grads.penalty_strength[row] = T(scale * partials.penalty_strength);
    if (call.grads.target_override) call.grads.target_override[row] = T(coeffs.label);
    return coeffs;
}

template <class T>
struct CrossEntropyRow {
    const SoftmaxCE<T>& call;

    template <class Sweep, class In>
    void operator()(Sweep& sweep, const In* x, int64_t row, T* e, In* gradient) const {
        const int64_t label = call.inputs.label_of(row);
        if (call.inputs.is_ignored(label)) return ignore_row(call, row, gradient);
        const RowSums sums = sweep.reader().read(x, row, label, call.needs_smooth_loss(), e);
        HingeSums hinge_sums;
        const HingeSums* hinge = nullptr;
        if (call.needs_hinge()) {
            hinge_sums = sweep.reader().hinge(x, row, label, sums.max, call.options.penalty_margin);
            hinge = &hinge_sums;
        }
        const GradCoefficients coeffs = finish_row(call, row, label, sums, options_of(call, row), hinge);
        if (!gradient && !call.grads.scale_bias) return;
        sweep.write({x, row, label, sums.max, sums.sum()}, coeffs, hinge, e, gradient);
    }
};

#include "softmax_short.inl"

template <class T>
void softmax_ce(const SoftmaxCE<T>& call, int64_t first, int64_t last, int thread) {
    if (is_short(call)) return short_rows<T>(call, first, last);
    const CrossEntropyRow<T> per_row{call};
    dispatch_logits<T>(call.inputs, call.grads, per_row, first, last, thread);
}

template <class T>
struct StatisticsRow {
    const SoftmaxStatistics<T>& call;

    template <class Sweep, class In>
    void operator()(Sweep& sweep, const In* x, int64_t row, T*, In*) const {
        const int64_t label = call.inputs.label_of(row);
        const bool ignored = call.inputs.is_ignored(label);
        const RowSums sums = sweep.reader().read(x, row, label, call.smooth_loss && !ignored, nullptr);
        RowStatistics statistics = row_statistics(sums, target_of(call.inputs, label, sums.soft_weight));
        if (call.hinge && !ignored)
            statistics.hinge = sweep.reader().hinge(x, row, label, sums.max, call.penalty_margin).sum;
        call.row_max[row] = T(sums.max);
        call.row_sum[row] = T(sums.sum());
        if (call.prediction) {
            const auto top = sweep.reader().prediction(x, label, sums);
            call.prediction[row] = top.index;
            call.confidence[row] = T(top.confidence);
        }
        record(row, ignored, statistics);
    }

    // Ignored rows have zeros but in log_sum_exp.
    void record(int64_t row, bool ignored, const RowStatistics& statistics) const {
        call.log_sum_exp[row] = T(statistics.log_sum_exp);
        call.target_logit[row] = ignored ? T(0) : T(statistics.target_logit);
        call.cross_entropy[row] = ignored ? T(0) : T(statistics.cross_entropy);
        call.one_minus_pt[row] = T(statistics.one_minus_pt);
        if (call.smooth_loss) call.smooth_loss[row] = T(statistics.smooth_loss);
        if (call.hinge) call.hinge[row] = T(statistics.hinge);
    }
};

template <class T>
struct StatisticsBackwardRow {
    const SoftmaxStatisticsBackward<T>& call;

    template <class Sweep, class In>
    void operator()(Sweep& sweep, const In* x, int64_t row, T*, In* gradient) const {
        const LogitInputs<T>& inputs = call.inputs;
        const int64_t label = inputs.label_of(row);
        const bool ignored = inputs.is_ignored(label);
        const double max = call.saved.row_max[row], sum = call.saved.row_sum[row];
        const RowPartials partials = partials_of(row, ignored);
        if (ignored && call.grads.target_override) call.grads.target_override[row] = 0;
        // Nobody needs an ignored row's gradient, unless its log_sum_exp was used: NaN logits there stay there.
        if (ignored && partials.log_sum_exp == 0) return zero_row(gradient, inputs.logits.num_classes);
        const bool soft = inputs.probabilities.data;
        const RowTarget target = target_of(inputs, label, soft ? sweep.reader().soft_weight(row) : 0.0);
        RowStatistics statistics;
        if (label >= 0) {
            statistics.one_minus_pt = call.saved.one_minus_pt[row];
            statistics.pt = sweep.reader().probability(x, row, label, max, sum);
        }
        HingeSums hinge_sums;
        const HingeSums* hinge = nullptr;
        if (partials.hinge != 0) {
            hinge_sums = sweep.reader().hinge(x, row, label, max, call.penalty_margin);
            hinge = &hinge_sums;
        }
        const GradCoefficients coeffs = grad_coefficients(partials, statistics, target, hinge);
        if (call.grads.target_override && !ignored) call.grads.target_override[row] = T(coeffs.label);
        sweep.write({x, row, label, max, sum}, coeffs, hinge, nullptr, gradient);
    }

    // The upstream gradients; an ignored row is a function of log_sum_exp alone.
    RowPartials partials_of(int64_t row, bool ignored) const {
        const StatisticsGrads<T>& upstream = call.upstream;
        RowPartials partials;
        partials.log_sum_exp = value(upstream.log_sum_exp, row);
        if (ignored) return partials;
        partials.target_logit = value(upstream.target_logit, row);
        partials.cross_entropy = value(upstream.cross_entropy, row);
        partials.smooth_loss = value(upstream.smooth_loss, row);
        partials.one_minus_pt = value(upstream.one_minus_pt, row);
        partials.hinge = value(upstream.hinge, row);
        return partials;
    }

    static double value(const T* gradient, int64_t row) { return gradient ? double(gradient[row]) : 0.0; }
};

template <class T>
void softmax_stats(const SoftmaxStatistics<T>& call, int64_t first, int64_t last, int thread) {
    const StatisticsRow<T> per_row{call};
    dispatch_logits<T>(call.inputs, SoftmaxGrads<T>(), per_row, first, last, thread);
}

template <class T>
void softmax_stats_backward(const SoftmaxStatisticsBackward<T>& call, int64_t first, int64_t last, int thread) {
    const StatisticsBackwardRow<T> per_row{call};
    dispatch_logits<T>(call.inputs, call.grads, per_row, first, last, thread);
}
