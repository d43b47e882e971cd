// The gradient of a row of logits, in one pass over exp(z - max), from the row's coefficients.

template <class T, class In>
class RowWriter {
public:
    RowWriter(const LogitInputs<T>& inputs, const SoftmaxGrads<T>& grads, int thread, LogitChunks<T, In>& z,
              SoftTargets<T>& soft_targets)
        : inputs_(inputs), count_(inputs.logits.num_classes), z_(z), soft_targets_(soft_targets) {
        if (grads.scale_bias) {
            scale_sum_ = grads.scale_bias + 2 * count_ * thread;
            bias_sum_ = scale_sum_ + count_;
        }
    }

    // Gradients are written by non-temporal stores from now on.
    void bypass_caches() { nontemporal_ = true; }

    // Where a row is, and what its exponentials are relative to.
    struct Place {
        const In* x;
        int64_t row, label;
        double max, sum;
    };

    // From the exponentials that `reader` kept in `e` or, without them, from x; `hinge` where the gradient has one.
    template <class Out>
    void write(const Place& place, const RowReader<T, In>& reader, const GradCoefficients& coeffs,
               const HingeSums* hinge, T* e, Out* gradient) {
        const bool reads_label = place.label >= 0 && (scale_sum_ || inputs_.soft_cap != 0);
        const double label_x = reads_label ? z_.capped(place.x, place.label) : 0.0;
        const double max = place.max == -HUGE_VAL ? 0.0 : place.max;
        if (coeffs.hinge == 0) hinge = nullptr;
        for (int64_t start = 0, chunk = 0; start < count_; start += kChunk, ++chunk) {
            const int64_t width = std::min(kChunk, count_ - start);
            T* chunk_e = e ? e + start : hinge ? e_ : z_.data();
            double factor = 1.0 / place.sum;
            if (hinge || !e) z_.hold(place.x, place.row, place.label, start, width);
            if (e) {
                const double change = reader.chunk_max(chunk) - max;
                if (change != 0 && !std::isnan(change)) factor *= std::exp(change);
            } else {
                exponentials<T, In>(z_.data(), T(max), 0, padded(width), chunk_e);
                if (chunk_e == z_.data()) z_.forget();
            }
            ChunkCoefficients<T> of_chunk{T(coeffs.softmax * factor), T(coeffs.smooth_loss), T(coeffs.soft),
                                          inputs_.class_weight ? inputs_.class_weight + start : nullptr};
            if (hinge) add_hinge_grad(coeffs, *hinge, start, width, of_chunk, chunk_e);
            const int64_t label = place.label - start;
            const bool has_label = place.label >= 0 && label >= 0 && label < width;
            if (has_label) {
                chunk_e[label] = 0;
                of_chunk.label = label;
                of_chunk.label_grad = T(coeffs.label * label_derivative(place.row, place.label, label_x));
            }
            write_chunk(place.x + start, place.row, start, width, of_chunk, chunk_e,
                        gradient ? gradient + start : nullptr);
            if (has_label && scale_sum_) add_label(place.label, label_x, coeffs);
        }
    }

private:
    static int64_t padded(int64_t width) {
        constexpr int64_t W = Lanes<T>::count;
        return (width + W - 1) / W * W;
    }

    // e becomes the gradient of softmax and hinge together.
    void add_hinge_grad(const GradCoefficients& coeffs, const HingeSums& hinge, int64_t start, int64_t width,
                        ChunkCoefficients<T>& of_chunk, T* e) {
        fold_hinge(z_.data(), of_chunk.softmax, T(hinge.threshold), T(-coeffs.hinge), width, e);
        const int64_t largest = hinge.largest - start;
        if (largest >= 0 && largest < width) e[largest] += T(coeffs.largest);
        of_chunk.softmax = 1;
    }

    template <class Out>
    void write_chunk(const In* x, int64_t row, int64_t start, int64_t width, const ChunkCoefficients<T>& coeffs,
                     const T* e, Out* gradient) {
        if (inputs_.probabilities.data) {
            ChunkCoefficients<T> soft = coeffs;
            soft.q = soft_targets_.chunk(row, start, width);
            if (!coeffs.class_weight) return write_kind<Subtract::soft>(x, start, width, soft, e, gradient);
            return write_kind<Subtract::weighted_soft>(x, start, width, soft, e, gradient);
        }
        if (coeffs.smooth_loss == 0) return write_kind<Subtract::nothing>(x, start, width, coeffs, e, gradient);
        if (!coeffs.class_weight) return write_kind<Subtract::smooth>(x, start, width, coeffs, e, gradient);
        return write_kind<Subtract::weighted_smooth>(x, start, width, coeffs, e, gradient);
    }

    template <Subtract kind, class Out>
    void write_kind(const In* x, int64_t start, int64_t width, const ChunkCoefficients<T>& coeffs, const T* e,
                    Out* gradient) {
        const T* scale = inputs_.scale ? inputs_.scale + start : nullptr;
        if (inputs_.soft_cap == 0) {
            if (scale_sum_) add_columns<T, kind>(coeffs, e, x, width, scale_sum_ + start, bias_sum_ + start);
            return write_scaled<kind>(coeffs, e, scale, width, gradient);
        }
        const T cap = inputs_.soft_cap;
        if (scale_sum_) {
            soft_capped<T>(x, cap, width, capped_);
            add_columns<T, kind>(coeffs, e, capped_, width, scale_sum_ + start, bias_sum_ + start);
        }
        soft_cap_derivative<T>(x, cap, scale, width, capped_);
        write_scaled<kind>(coeffs, e, capped_, width, gradient);
    }

    template <Subtract kind, class Out>
    void write_scaled(const ChunkCoefficients<T>& coeffs, const T* e, const T* scale, int64_t width, Out* gradient) {
        if (!gradient) return;
        if (nontemporal_) return write_scaled<kind, true>(coeffs, e, scale, width, gradient);
        return write_scaled<kind, false>(coeffs, e, scale, width, gradient);
    }

    template <Subtract kind, bool kNonTemporal, class Out>
    void write_scaled(const ChunkCoefficients<T>& coeffs, const T* e, const T* scale, int64_t width, Out* gradient) {
        if (scale) write_grads<T, kind, true, kNonTemporal>(coeffs, e, scale, width, gradient);
        else write_grads<T, kind, false, kNonTemporal>(coeffs, e, scale, width, gradient);
    }

    // The column pass saw e = 0 at the label and added only what is subtracted everywhere.
    void add_label(int64_t label, double label_x, const GradCoefficients& coeffs) {
        const double subtracted = coeffs.smooth_loss * inputs_.weight_of(label);
        const double missing = inputs_.target_override ? subtracted : coeffs.label + subtracted;
        bias_sum_[label] += missing;
        scale_sum_[label] += missing == 0 ? 0.0 : missing * label_x;
    }

    // dz/dx at the label.
    double label_derivative(int64_t row, int64_t label, double label_x) const {
        if (inputs_.target_override) return inputs_.target_override_grad[row];
        const double scale = inputs_.scale ? inputs_.scale[label] : T(1);
        if (inputs_.soft_cap == 0) return scale;
        const double tanh = label_x / inputs_.soft_cap;
        return scale * (1 - tanh) * (1 + tanh);
    }

    const LogitInputs<T>& inputs_;
    const int64_t count_;
    LogitChunks<T, In>& z_;
    SoftTargets<T>& soft_targets_;
    alignas(64) T e_[kChunk];
    alignas(64) T capped_[kChunk];
    bool nontemporal_ = false;
    double *scale_sum_ = nullptr, *bias_sum_ = nullptr;
};
