// A row of logits: statistics in one pass over x, gradient in one more over exp(z - max), which is kept in the
// gradient's own row (or in a buffer where types differ).

template <class T, class In>
class RowSweep {
public:
    RowSweep(const SoftmaxInputs<T>& inputs, const SoftmaxGradients& gradients, int thread)
        : inputs_(inputs), count_(inputs.logits.num_classes), soft_(inputs) {
        if (gradients.scale_bias) {
            scale_sum_ = gradients.scale_bias + 2 * count_ * thread;
            bias_sum_ = scale_sum_ + count_;
        }
    }

    // Statistics of one row. Where `e` is given exp(z - chunk maximum) is kept there.
    RowSums read(const In* x, int64_t row, bool want_uniform, T* e) {
        RowSums sums;
        const int64_t label = inputs_.labels ? inputs_.labels[row] : -1;
        chunk_max_.clear();
        for (int64_t start = 0; start < count_; start += kChunk) {
            const int64_t width = std::min(kChunk, count_ - start);
            const T chunk_max = load_z(x, row, start, width);
            const T shift = chunk_max == kMinusInfinity<T> ? T(0) : chunk_max;
            chunk_max_.push_back(chunk_max);
            if (start == 0) sums.reference = shift;
            if (want_uniform) sums.uniform_z += uniform_sum(start, width, shift, sums.reference);
            if (inputs_.probabilities.data) soft_.add(row, start, width, z_, shift, sums);
            RowSums chunk;
            exponentials_of_chunk(shift, label - start, start, width, e ? e + start : nullptr, chunk);
            if (label >= start && label < start + width) sums.label_z = chunk.label_z;
            if (double(chunk_max) > sums.max) {
                if (start != 0) sums.rescale(sums.max - chunk_max);
                sums.max = chunk_max;
            } else if (chunk_max != kMinusInfinity<T>) {
                chunk.rescale(chunk_max - sums.max);
            }
            sums.rest += chunk.rest;
            sums.label_exp += chunk.label_exp;
        }
        return sums;
    }

    // sum_k relu(max z - z_k - margin); follows read() of the same row.
    HingeSums hinge(const In* x, int64_t row, double max, double margin) {
        HingeSums hinge;
        hinge.threshold = max - margin;
        const int64_t label = inputs_.labels ? inputs_.labels[row] : -1;
        for (int64_t start = 0; start < count_; start += kChunk) {
            const int64_t width = std::min(kChunk, count_ - start);
            hold_z(x, row, start, width);
            add_hinge(z_, T(hinge.threshold), width, hinge.sum, hinge.violations);
            if (hinge.largest < 0) hinge.largest = first_equal(z_, T(max), start, width);
            if (label >= start && label < start + width) hinge.label_violates = z_[label - start] < hinge.threshold;
        }
        return hinge;
    }

    // Writes the gradient of one row, from the exponentials kept by read() or, without them, from x.
    template <class Out>
    void write(const In* x, int64_t row, const RowSlope& slope, double max, double sum, const HingeSums* hinge, T* e,
               Out* gradient) {
        const bool label_read = slope.label_index >= 0 && (scale_sum_ || inputs_.soft_cap != 0);
        const double label_x = label_read ? capped_one(x + slope.label_index) : 0.0;
        const double reference = max == -HUGE_VAL ? 0.0 : max;
        if (slope.hinge == 0) hinge = nullptr;
        for (int64_t start = 0, chunk = 0; start < count_; start += kChunk, ++chunk) {
            const int64_t width = std::min(kChunk, count_ - start);
            T* chunk_e = e ? e + start : hinge ? e_ : z_;
            double factor = 1.0 / sum;
            if (hinge || !e) hold_z(x, row, start, width);
            if (e) {
                const double change = chunk_max_[chunk] - reference;
                if (change != 0 && !std::isnan(change)) factor *= std::exp(change);
            } else {
                exponentials<T, In>(z_, T(reference), 0, padded(width), chunk_e);
                if (chunk_e == z_) held_row_ = -1;
            }
            const int64_t label = slope.label_index - start;
            const bool has_label = slope.label_index >= 0 && label >= 0 && label < width;
            Slope<T> chunk_slope{T(slope.softmax * factor), T(slope.uniform), T(slope.soft),
                                 inputs_.class_weight ? inputs_.class_weight + start : nullptr};
            if (hinge) add_hinge_slopes(slope, *hinge, start, width, chunk_slope, chunk_e);
            if (has_label) {
                chunk_e[label] = 0;
                chunk_slope.label = label;
                chunk_slope.label_slope = T(slope.label * label_x_slope(row, slope.label_index, label_x));
            }
            finish_chunk(x + start, row, start, width, chunk_slope, chunk_e, gradient ? gradient + start : nullptr);
            if (has_label && scale_sum_) add_label(label_x, slope);
        }
    }

    struct Top {
        int64_t index = 0;
        double confidence = 0;
    };

    // The first largest class of z, or the first NaN, and its probability; without target_override. Follows read().
    Top prediction(const In* x, int64_t row, const RowSums& sums) {
        Top top;
        double max = sums.max, sum = sums.sum();
        const int64_t label = inputs_.labels ? inputs_.labels[row] : -1;
        if (inputs_.target_override && label >= 0 && label < count_) {
            const double label_z = plain(x, label);
            for (int64_t start = 0; start < count_; start += kChunk)
                set_chunk_max(start, load_chunk(x, start, std::min(kChunk, count_ - start)));
            max = *std::max_element(chunk_max_.begin(), chunk_max_.end());
            const double rest = sums.rest == 0 ? 0.0 : sums.rest * std::exp(sums.max - max);
            sum = rest + std::exp(label_z - max);
        }
        top.confidence = sum == 0 ? std::numeric_limits<double>::quiet_NaN() : 1 / sum;
        const bool has_nan = std::isnan(sum);
        for (int64_t start = 0, chunk = 0; start < count_; start += kChunk, ++chunk) {
            if (!has_nan && chunk_max_[chunk] != max) continue;
            const int64_t width = std::min(kChunk, count_ - start);
            load_chunk(x, start, width);
            for (int64_t j = 0; j < width; ++j) {
                if (has_nan ? !std::isnan(z_[j]) : z_[j] != max) continue;
                top.index = start + j;
                return top;
            }
        }
        return top;
    }

    // p of the label, from the row's maximum and sum.
    double probability(const In* x, int64_t row, int64_t label, double max, double sum) const {
        const double z = inputs_.target_override ? double(inputs_.target_override[row]) : plain(x, label);
        return std::exp(z - (max == -HUGE_VAL ? 0.0 : max)) / sum;
    }

    double soft_weight(int64_t row) {
        double weight = 0;
        for (int64_t start = 0; start < count_; start += kChunk)
            weight += soft_.weight(row, start, std::min(kChunk, count_ - start));
        return weight;
    }

    // What is fetched ahead while the row is swept.
    void set_next(NextRow next) {
        next_ = next;
        soft_.fetch_ahead();
    }

    // Gradients are written past the caches from now on.
    void stream_gradients() { streams_ = true; }

private:
    static int64_t padded(int64_t width) {
        constexpr int64_t W = Lanes<T>::count;
        return (width + W - 1) / W * W;
    }

    // z of the row's chunk, with target_override in its place; returns the largest.
    T load_z(const In* x, int64_t row, int64_t start, int64_t width) {
        const T chunk_max = load_chunk(x, start, width);
        held_row_ = row;
        held_start_ = start;
        return inputs_.target_override ? place_label(row, start, width, chunk_max) : chunk_max;
    }

    void hold_z(const In* x, int64_t row, int64_t start, int64_t width) {
        if (held_row_ != row || held_start_ != start) load_z(x, row, start, width);
    }

    // Of x alone, without target_override.
    T load_chunk(const In* x, int64_t start, int64_t width) {
        held_row_ = -1;
        const T* scale = inputs_.scale ? inputs_.scale + start : nullptr;
        const T* bias = inputs_.bias ? inputs_.bias + start : nullptr;
        if (inputs_.soft_cap != 0) {
            soft_capped<T>(x + start, T(inputs_.soft_cap), width, z_);
            return affine_of(z_, scale, bias, width);
        }
        return affine_of(x + start, scale, bias, width);
    }

    template <class From>
    T affine_of(const From* x, const T* scale, const T* bias, int64_t width) {
        if (scale && bias) return affine<T, true, true>(x, scale, bias, width, z_);
        if (scale) return affine<T, true, false>(x, scale, bias, width, z_);
        if (bias) return affine<T, false, true>(x, scale, bias, width, z_);
        return affine<T, false, false>(x, scale, bias, width, z_);
    }

    // Puts target_override in its place in z_; returns the maximum that the chunk has then.
    T place_label(int64_t row, int64_t start, int64_t width, T chunk_max) {
        const int64_t label = inputs_.labels[row] - start;
        if (inputs_.labels[row] == inputs_.ignore_index || label < 0 || label >= width) return chunk_max;
        const T before = z_[label];
        z_[label] = inputs_.target_override[row];
        return before == chunk_max ? largest_of_chunk(z_, width) : larger(z_[label], chunk_max);
    }

    double capped_one(const In* x) const {
        const double value = read_one(x);
        return inputs_.soft_cap == 0 ? value : inputs_.soft_cap * std::tanh(value / inputs_.soft_cap);
    }

    // z of one class as load_chunk has it, but for rounding.
    double plain(const In* x, int64_t label) const {
        T z = capped_one(x + label);
        if (inputs_.scale) z *= inputs_.scale[label];
        if (inputs_.bias) z += inputs_.bias[label];
        return z;
    }

    void set_chunk_max(int64_t start, T chunk_max) { chunk_max_[start / kChunk] = chunk_max; }

    // e becomes softmax slope and hinge slope together.
    void add_hinge_slopes(const RowSlope& slope, const HingeSums& hinge, int64_t start, int64_t width,
                          Slope<T>& chunk_slope, T* e) {
        fold_hinge(z_, chunk_slope.softmax, T(hinge.threshold), T(-slope.hinge), width, e);
        const int64_t largest = hinge.largest - start;
        if (largest >= 0 && largest < width) e[largest] += T(slope.hinge * hinge.violations);
        chunk_slope.softmax = 1;
    }

    // The label's vector is summed apart, so that 1 - p of a confident row keeps its digits.
    void exponentials_of_chunk(T shift, int64_t label, int64_t start, int64_t width, T* e, RowSums& chunk) {
        const NextRow* next = next_.x ? &next_ : nullptr;
        constexpr int64_t W = Lanes<T>::count;
        T* z = z_;
        const int64_t whole = width / W * W;
        const bool has_label = label >= 0 && label < width;
        if (has_label) chunk.label_z = z[label];
        const int64_t label_vector = has_label ? label / W * W : whole;
        T* target = e ? e : z;
        if (!e) held_row_ = -1;
        Vector<T> sum = exponentials<T, In>(z, shift, 0, std::min(label_vector, whole), target, next, start);
        if (label_vector < whole) {
            const Vector<T> value = exp_nonpositive(load(z + label_vector) - shift);
            store(target + label_vector, value);
            Vector<T> others = value;
            chunk.label_exp = value[label % W];
            others[label % W] = 0;
            sum += others;
            sum += exponentials<T, In>(z, shift, label_vector + W, whole, target, next, start);
        }
        if (whole < width) {
            Vector<T> value = exp_nonpositive(load(z + whole) - shift);
            store_partial<T>(target + whole, value, width - whole);
            if (has_label && label >= whole) {
                chunk.label_exp = value[label - whole];
                value[label - whole] = 0;
            }
            sum += value;
        }
        chunk.rest = sum_lanes<T>(sum);
    }

    double uniform_sum(int64_t start, int64_t width, T shift, double reference) {
        const T* weight = inputs_.class_weight ? inputs_.class_weight + start : nullptr;
        return weighted_sum(z_, shift, weight, width) + chunk_weight(start, width) * (shift - reference);
    }

    // Sum of the class weights of a chunk, added up once.
    double chunk_weight(int64_t start, int64_t width) {
        if (!inputs_.class_weight) return width;
        if (count_ <= kChunk) return inputs_.weight_sum;
        const int64_t chunk = start / kChunk;
        if (chunk == int64_t(chunk_weights_.size()))
            chunk_weights_.push_back(
                std::accumulate(inputs_.class_weight + start, inputs_.class_weight + start + width, 0.0));
        return chunk_weights_[chunk];
    }

    template <class Out>
    void finish_chunk(const In* x, int64_t row, int64_t start, int64_t width, const Slope<T>& slope, const T* e,
                      Out* gradient) {
        if (inputs_.probabilities.data) {
            Slope<T> soft = slope;
            soft.q = soft_.chunk(row, start, width);
            if (!slope.class_weight) return finish<Subtract::soft>(x, start, width, soft, e, gradient);
            return finish<Subtract::weighted_soft>(x, start, width, soft, e, gradient);
        }
        if (slope.uniform == 0) return finish<Subtract::nothing>(x, start, width, slope, e, gradient);
        if (!slope.class_weight) return finish<Subtract::uniform>(x, start, width, slope, e, gradient);
        return finish<Subtract::weighted>(x, start, width, slope, e, gradient);
    }

    template <Subtract kind, class Out>
    void finish(const In* x, int64_t start, int64_t width, const Slope<T>& slope, const T* e, Out* gradient) {
        const T* scale = inputs_.scale ? inputs_.scale + start : nullptr;
        if (inputs_.soft_cap == 0) {
            if (scale_sum_) add_columns<T, kind>(slope, e, x, width, scale_sum_ + start, bias_sum_ + start);
            return write_scaled<kind>(slope, e, scale, width, gradient);
        }
        const T cap = inputs_.soft_cap;
        if (scale_sum_) {
            soft_capped<T>(x, cap, width, capped_);
            add_columns<T, kind>(slope, e, capped_, width, scale_sum_ + start, bias_sum_ + start);
        }
        soft_cap_slopes<T>(x, cap, scale, width, capped_);
        write_scaled<kind>(slope, e, capped_, width, gradient);
    }

    template <Subtract kind, class Out>
    void write_scaled(const Slope<T>& slope, const T* e, const T* scale, int64_t width, Out* gradient) {
        if (!gradient) return;
        if (streams_) return write_scaled<kind, true>(slope, e, scale, width, gradient);
        return write_scaled<kind, false>(slope, e, scale, width, gradient);
    }

    template <Subtract kind, bool kStream, class Out>
    void write_scaled(const Slope<T>& slope, const T* e, const T* scale, int64_t width, Out* gradient) {
        if (scale) write_slopes<T, kind, true, kStream>(slope, e, scale, width, gradient);
        else write_slopes<T, kind, false, kStream>(slope, e, scale, width, gradient);
    }

    // The column pass saw e = 0 at the label and added only what is subtracted everywhere.
    void add_label(double label_x, const RowSlope& slope) {
        const int64_t label = slope.label_index;
        const double subtracted = slope.uniform * (inputs_.class_weight ? inputs_.class_weight[label] : T(1));
        const double missing = inputs_.target_override ? subtracted : slope.label + subtracted;
        bias_sum_[label] += missing;
        scale_sum_[label] += missing == 0 ? 0.0 : missing * label_x;
    }

    // dz/dx at the label.
    double label_x_slope(int64_t row, int64_t label, double label_x) const {
        if (inputs_.target_override) return inputs_.target_override_grad[row];
        const double scale = inputs_.scale ? inputs_.scale[label] : T(1);
        if (inputs_.soft_cap == 0) return scale;
        const double tanh = label_x / inputs_.soft_cap;
        return scale * (1 - tanh) * (1 + tanh);
    }

    const SoftmaxInputs<T>& inputs_;
    int64_t count_;
    alignas(64) T z_[kChunk];
    alignas(64) T e_[kChunk];
    alignas(64) T capped_[kChunk];
    int64_t held_row_ = -1, held_start_ = 0;  // whose z are in z_
    std::vector<T> chunk_max_;
    std::vector<double> chunk_weights_;
    SoftTargets<T> soft_;
    NextRow next_;
    bool streams_ = false;
    double *scale_sum_ = nullptr, *bias_sum_ = nullptr;
};
