// A row of logits: statistics in one pass over x, gradient in one more over exp(z - max), which is kept in the
// gradient's own row (or in a buffer where types differ); and the loop over rows, whatever their strides.

template <class T, class In>
class RowSweep {
public:
    RowSweep(const SoftmaxInputs<T>& inputs, const SoftmaxGradients& gradients, int thread)
        : inputs_(inputs), count_(inputs.logits.num_classes) {
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
            T chunk_max = load_chunk(x, start, width);
            if (inputs_.label_logit) chunk_max = place_label(row, start, width, chunk_max);
            const T shift = chunk_max == kMinusInfinity<T> ? T(0) : chunk_max;
            chunk_max_.push_back(chunk_max);
            if (start == 0) sums.reference = shift;
            if (want_uniform) sums.uniform_z += uniform_sum(start, width, shift, sums.reference);
            if (inputs_.probabilities.data) add_soft(sums, row, start, width, shift);
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
            const T chunk_max = load_chunk(x, start, width);
            if (inputs_.label_logit) place_label(row, start, width, chunk_max);
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
        for (int64_t start = 0, chunk = 0; start < count_; start += kChunk, ++chunk) {
            const int64_t width = std::min(kChunk, count_ - start);
            T* chunk_e = e ? e + start : z_;
            double factor = 1.0 / sum;
            if (hinge && slope.hinge != 0) load_hinge(x, row, start, width, slope.hinge, hinge->threshold);
            if (e) {
                const double change = chunk_max_[chunk] - reference;
                if (change != 0 && !std::isnan(change)) factor *= std::exp(change);
            } else {
                load_chunk(x, start, width);
                exponentials<T, In>(z_, T(reference), 0, padded(width), z_);
            }
            const int64_t label = slope.label_index - start;
            const bool has_label = slope.label_index >= 0 && label >= 0 && label < width;
            Slope<T> chunk_slope{T(slope.softmax * factor), T(slope.uniform), T(slope.soft),
                                 inputs_.class_weight ? inputs_.class_weight + start : nullptr, q_};
            if (hinge && slope.hinge != 0) fold_hinge(slope, *hinge, start, width, chunk_slope, chunk_e);
            if (has_label) chunk_e[label] = 0;
            finish_chunk(x + start, row, start, width, chunk_slope, chunk_e, gradient ? gradient + start : nullptr);
            if (has_label) finish_label(row, label_x, slope, gradient);
        }
    }

    struct Top {
        int64_t index = 0;
        double confidence = 0;
    };

    // The first largest class of z, or the first NaN, and its probability; without label_logit. Follows read().
    Top prediction(const In* x, int64_t row, const RowSums& sums) {
        Top top;
        double max = sums.max, sum = sums.sum();
        const int64_t label = inputs_.labels ? inputs_.labels[row] : -1;
        if (inputs_.label_logit && label >= 0 && label < count_) {
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
        const double z = inputs_.label_logit ? double(inputs_.label_logit[row]) : plain(x, label);
        return std::exp(z - (max == -HUGE_VAL ? 0.0 : max)) / sum;
    }

    double soft_weight(int64_t row) {
        double weight = 0;
        for (int64_t start = 0; start < count_; start += kChunk) {
            const int64_t width = std::min(kChunk, count_ - start);
            load_soft(row, start, width);
            for (int64_t j = 0; j < width; ++j) weight += q_[j];
        }
        return weight;
    }

    void set_next(NextRow next) { next_ = next; }

private:
    static int64_t padded(int64_t width) {
        constexpr int64_t W = Lanes<T>::count;
        return (width + W - 1) / W * W;
    }

    T load_chunk(const In* x, int64_t start, int64_t width) {
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

    // Puts label_logit in its place in z_; returns the maximum that the chunk has then.
    T place_label(int64_t row, int64_t start, int64_t width, T chunk_max) {
        const int64_t label = inputs_.labels[row] - start;
        if (inputs_.labels[row] == inputs_.ignore_index || label < 0 || label >= width) return chunk_max;
        const T before = z_[label];
        z_[label] = inputs_.label_logit[row];
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

    // q_ becomes the hinge's slope for the chunk: nothing else needs it before finish_chunk.
    void load_hinge(const In* x, int64_t row, int64_t start, int64_t width, double hinge, double threshold) {
        const T chunk_max = load_chunk(x, start, width);
        if (inputs_.label_logit) place_label(row, start, width, chunk_max);
        const T below = T(-hinge), limit = T(threshold);
        for (int64_t j = 0; j < width; ++j) q_[j] = z_[j] < limit ? below : T(0);
    }

    // e becomes softmax slope and hinge slope together.
    void fold_hinge(const RowSlope& slope, const HingeSums& hinge, int64_t start, int64_t width, Slope<T>& chunk_slope,
                    T* e) {
        for (int64_t j = 0; j < width; ++j) e[j] = e[j] * chunk_slope.softmax + q_[j];
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

    // q_ becomes w_j q_j for the chunk.
    void load_soft(int64_t row, int64_t start, int64_t width) {
        const View& view = inputs_.probabilities;
        const int64_t offset = view.row_offset(row) + start * view.class_stride;
        if constexpr (std::is_same_v<T, double>)
            gather(static_cast<const double*>(view.data) + offset, view.class_stride, width, q_);
        else if (view.dtype == DType::float32)
            gather(static_cast<const float*>(view.data) + offset, view.class_stride, width, q_);
        else if (view.dtype == DType::bfloat16)
            gather(static_cast<const BFloat16*>(view.data) + offset, view.class_stride, width, q_);
        else gather(static_cast<const Float16*>(view.data) + offset, view.class_stride, width, q_);
        if (!inputs_.class_weight) return;
        for (int64_t j = 0; j < width; ++j) q_[j] *= inputs_.class_weight[start + j];
    }

    void add_soft(RowSums& sums, int64_t row, int64_t start, int64_t width, T shift) {
        load_soft(row, start, width);
        double weight = 0;
        for (int64_t j = 0; j < width; ++j) weight += q_[j];
        sums.soft_weight += weight;
        sums.soft_z += weighted_sum(z_, shift, q_, width) + weight * (shift - sums.reference);
    }

    template <class Out>
    void finish_chunk(const In* x, int64_t row, int64_t start, int64_t width, const Slope<T>& slope, const T* e,
                      Out* gradient) {
        if (inputs_.probabilities.data) {
            load_soft(row, start, width);
            // Smoothing moves part of each row's mass to w_j / K: fold both into one vector.
            if (slope.uniform != 0)
                for (int64_t j = 0; j < width; ++j)
                    q_[j] = q_[j] * slope.soft + slope.uniform * (slope.class_weight ? slope.class_weight[j] : T(1));
            Slope<T> soft = slope;
            if (slope.uniform != 0) soft.soft = 1;
            return finish<Subtract::soft>(x, start, width, soft, e, gradient);
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
        if (scale) write_slopes<T, kind, true>(slope, e, scale, width, gradient);
        else write_slopes<T, kind, false>(slope, e, scale, width, gradient);
    }

    template <class Out>
    void finish_label(int64_t row, double label_x, const RowSlope& slope, Out* gradient) {
        const int64_t label = slope.label_index;
        if (gradient) write_one(gradient + label, T(slope.label * label_x_slope(row, label, label_x)));
        if (!scale_sum_) return;
        // The column pass saw e = 0 at the label and added only what is subtracted everywhere.
        const double subtracted = slope.uniform * (inputs_.class_weight ? inputs_.class_weight[label] : T(1));
        const double missing = inputs_.label_logit ? subtracted : slope.label + subtracted;
        bias_sum_[label] += missing;
        scale_sum_[label] += missing == 0 ? 0.0 : missing * label_x;
    }

    // dz/dx at the label.
    double label_x_slope(int64_t row, int64_t label, double label_x) const {
        if (inputs_.label_logit) return inputs_.label_slope[row];
        const double scale = inputs_.scale ? inputs_.scale[label] : T(1);
        if (inputs_.soft_cap == 0) return scale;
        const double tanh = label_x / inputs_.soft_cap;
        return scale * (1 - tanh) * (1 + tanh);
    }

    const SoftmaxInputs<T>& inputs_;
    int64_t count_;
    alignas(64) T z_[kChunk];
    alignas(64) T q_[kChunk];
    alignas(64) T capped_[kChunk];
    std::vector<T> chunk_max_;
    std::vector<double> chunk_weights_;
    NextRow next_;
    double *scale_sum_ = nullptr, *bias_sum_ = nullptr;
};

// Subnormal results become 0 while this lives: slopes go into matrix products, which are 25 times slower over
// subnormals.
class FlushSubnormals {
public:
    explicit FlushSubnormals(bool wanted) {
#if defined(__x86_64__)
        saved_ = _mm_getcsr();
        if (wanted) _mm_setcsr(saved_ | kFlushToZero);
#else
        (void)wanted;
#endif
    }
    ~FlushSubnormals() {
#if defined(__x86_64__)
        _mm_setcsr(saved_);
#endif
    }
    FlushSubnormals(const FlushSubnormals&) = delete;
    FlushSubnormals& operator=(const FlushSubnormals&) = delete;

private:
    static constexpr unsigned kFlushToZero = 0x8000;
    unsigned saved_ = 0;
};

// Runs `per_row` over rows [first, last): directly on the tensors where the classes of a row are adjacent in memory,
// else on tiles gathered into buffers, neighbouring rows together so that each cache line is fetched once.
template <class T, class In, class PerRow>
void sweep_rows(const SoftmaxInputs<T>& inputs, const SoftmaxGradients& gradients, const PerRow& per_row, int64_t first,
                int64_t last, int thread) {
    const View& x = inputs.logits;
    const View& g = gradients.logits;
    const int64_t K = x.num_classes;
    const bool keep = (g.data || gradients.scale_bias) && K <= kKeepExponentials;
    const FlushSubnormals flush(g.data && g.data == x.data);
    if (x.class_stride == 1 && (!g.data || g.class_stride == 1)) {
        RowSweep<T, In> sweep(inputs, gradients, thread);
        const bool own_buffer = keep && (!g.data || !std::is_same_v<In, T> || g.data == x.data);
        std::vector<T> exponentials(own_buffer ? K : 0);
        const int64_t row_bytes = K * static_cast<int64_t>(sizeof(In));
        const bool fetch_ahead = row_bytes >= kLeastFetchedAhead && row_bytes <= kMostFetchedAhead;
        for (int64_t row = first; row < last; ++row) {
            In* gradient = g.data ? g.row<In>(row) : nullptr;
            if (fetch_ahead && row + 1 < last)
                sweep.set_next({reinterpret_cast<const char*>(x.row<const In>(row + 1)),
                                g.data ? reinterpret_cast<const char*>(g.row<In>(row + 1)) : nullptr});
            T* e = own_buffer ? exponentials.data() : keep ? reinterpret_cast<T*>(gradient) : nullptr;
            per_row(sweep, x.row<const In>(row), row, e, gradient);
        }
        return;
    }
    RowSweep<T, T> sweep(inputs, gradients, thread);
    std::vector<T> tile(kStagedRows * K), tile_gradient(g.data ? kStagedRows * K : 0), exponentials(keep ? K : 0);
    const In* rows[kStagedRows];
    In* gradients_of[kStagedRows];
    for (int64_t start = first; start < last; start += kStagedRows) {
        const int64_t count = std::min(kStagedRows, last - start);
        for (int64_t r = 0; r < count; ++r) {
            rows[r] = x.row<const In>(start + r);
            gradients_of[r] = g.data ? g.row<In>(start + r) : nullptr;
        }
        for (int64_t j = 0; j < K; ++j)
            for (int64_t r = 0; r < count; ++r) tile[r * K + j] = read_one(rows[r] + j * x.class_stride);
        for (int64_t r = 0; r < count; ++r)
            per_row(sweep, static_cast<const T*>(&tile[r * K]), start + r, keep ? exponentials.data() : nullptr,
                    g.data ? &tile_gradient[r * K] : nullptr);
        if (!g.data) continue;
        for (int64_t j = 0; j < K; ++j)
            for (int64_t r = 0; r < count; ++r)
                write_one(gradients_of[r] + j * g.class_stride, tile_gradient[r * K + j]);
    }
}

// The stored type of the logits is named here and nowhere else.
template <class T, class PerRow>
void dispatch_logits(const SoftmaxInputs<T>& inputs, const SoftmaxGradients& gradients, const PerRow& per_row,
                     int64_t first, int64_t last, int thread) {
    if constexpr (std::is_same_v<T, double>) {
        sweep_rows<T, double>(inputs, gradients, per_row, first, last, thread);
    } else {
        switch (inputs.logits.dtype) {
            case DType::bfloat16: return sweep_rows<T, BFloat16>(inputs, gradients, per_row, first, last, thread);
            case DType::float16: return sweep_rows<T, Float16>(inputs, gradients, per_row, first, last, thread);
            default: return sweep_rows<T, float>(inputs, gradients, per_row, first, last, thread);
        }
    }
}
