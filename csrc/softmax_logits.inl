// z = scale * c(x) + bias of one row, a chunk at a time.

template <class T, class In>
class LogitChunks {
public:
    explicit LogitChunks(const LogitInputs<T>& inputs) : inputs_(inputs) {}

    T* data() { return z_; }

    // Whoever writes over data() says so.
    void forget() { held_row_ = -1; }

    // z of the row's chunk, with target_override at the label; returns the largest.
    T load(const In* x, int64_t row, int64_t label, int64_t start, int64_t width) {
        const T chunk_max = load_plain(x, start, width);
        held_row_ = row;
        held_start_ = start;
        const int64_t in_chunk = label - start;
        if (!inputs_.target_override || label < 0 || in_chunk < 0 || in_chunk >= width) return chunk_max;
        const T before = z_[in_chunk];
        z_[in_chunk] = inputs_.target_override[row];
        return before == chunk_max ? largest_of_chunk(z_, width) : larger(z_[in_chunk], chunk_max);
    }

    // load(), unless the chunk is there already.
    void hold(const In* x, int64_t row, int64_t label, int64_t start, int64_t width) {
        if (held_row_ != row || held_start_ != start) load(x, row, label, start, width);
    }

    // Without target_override.
    T load_plain(const In* x, int64_t start, int64_t width) {
        forget();
        const T* scale = inputs_.scale ? inputs_.scale + start : nullptr;
        const T* bias = inputs_.bias ? inputs_.bias + start : nullptr;
        if (inputs_.soft_cap != 0) {
            soft_capped<T>(x + start, T(inputs_.soft_cap), width, z_);
            return affine_of(z_, scale, bias, width);
        }
        return affine_of(x + start, scale, bias, width);
    }

    // z of one class as load_plain has it, but for rounding.
    double plain(const In* x, int64_t label) const {
        T z = capped(x, label);
        if (inputs_.scale) z *= inputs_.scale[label];
        if (inputs_.bias) z += inputs_.bias[label];
        return z;
    }

    // c(x) of one class.
    double capped(const In* x, int64_t label) const {
        const double value = read_one(x + label);
        return inputs_.soft_cap == 0 ? value : inputs_.soft_cap * std::tanh(value / inputs_.soft_cap);
    }

private:
    template <class From>
    T affine_of(const From* x, const T* scale, const T* bias, int64_t width) {
        if (scale && bias) return affine<T, true, true>(x, scale, bias, width, z_);
        if (scale) return affine<T, true, false>(x, scale, bias, width, z_);
        if (bias) return affine<T, false, true>(x, scale, bias, width, z_);
        return affine<T, false, false>(x, scale, bias, width, z_);
    }

    const LogitInputs<T>& inputs_;
    alignas(64) T z_[kChunk];
    int64_t held_row_ = -1, held_start_ = 0;  // whose z are in z_
};
