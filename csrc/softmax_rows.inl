// The loop over rows, whatever their type and strides.

// Subnormal results become 0 while this lives: gradients go into matrix products, which are 25 times slower over
// subnormals.
class FlushSubnormals {
public:
    explicit FlushSubnormals(bool enabled) {
#if defined(__x86_64__)
        saved_ = _mm_getcsr();
        if (enabled) _mm_setcsr(saved_ | kFlushToZero);
#else
        (void)enabled;
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

// Whether the gradient would push everything else out of the caches, and itself too before anybody reads it.
template <class In>
bool bypasses_caches(const View& x, const View& g) {
    const int64_t bytes = g.num_rows() * g.num_classes * static_cast<int64_t>(sizeof(In));
    return g.data && g.data != x.data && bytes >= kNonTemporalBytes;
}

// What to prefetch while the exponentials of a row are computed: the next row, or what comes next in a long one.
template <class In>
NextRow prefetched(const View& x, const View& g, int64_t row, int64_t last) {
    const int64_t bytes = x.num_classes * static_cast<int64_t>(sizeof(In));
    const bool is_long = bytes > kMostPrefetched;
    if (bytes < kLeastPrefetched || (!is_long && row + 1 == last)) return {};
    const int64_t ahead = is_long ? row : row + 1, beyond = is_long ? kPrefetchDistance : 0;
    return {reinterpret_cast<const char*>(x.row<const In>(ahead)) + beyond,
            g.data ? reinterpret_cast<const char*>(g.row<In>(ahead)) + beyond : nullptr};
}

// Whether exp(z - max) of a row is kept between its two passes.
template <class T>
bool keeps_exponentials(const SoftmaxGrads<T>& grads, int64_t num_classes) {
    return (grads.logits.data || grads.scale_bias) && num_classes <= kKeepExponentials;
}

// Rows whose classes are contiguous in memory, where they are.
template <class T, class In, class PerRow>
void sweep_contiguous_rows(const LogitInputs<T>& inputs, const SoftmaxGrads<T>& grads, const PerRow& per_row,
                           int64_t first, int64_t last, int thread) {
    const View &x = inputs.logits, &g = grads.logits;
    const bool keep = keeps_exponentials(grads, x.num_classes);
    const bool bypass = bypasses_caches<In>(x, g);
    RowSweep<T, In> sweep(inputs, grads, thread);
    if (bypass) sweep.bypass_caches();
    const bool own_buffer = keep && (!g.data || !std::is_same_v<In, T> || g.data == x.data || bypass);
    std::vector<T> exponentials(own_buffer ? x.num_classes : 0);
    for (int64_t row = first; row < last; ++row) {
        In* gradient = g.data ? g.row<In>(row) : nullptr;
        const NextRow next = prefetched<In>(x, bypass ? View() : g, row, last);
        if (next.x) sweep.set_next(next);
        T* e = own_buffer ? exponentials.data() : keep ? reinterpret_cast<T*>(gradient) : nullptr;
        per_row(sweep, x.row<const In>(row), row, e, gradient);
    }
    if (bypass) nontemporal_fence();
}

// Other rows on tiles gathered into buffers, neighbouring rows together so that each cache line is read once.
template <class T, class In, class PerRow>
void sweep_gathered_rows(const LogitInputs<T>& inputs, const SoftmaxGrads<T>& grads, const PerRow& per_row,
                         int64_t first, int64_t last, int thread) {
    const View &x = inputs.logits, &g = grads.logits;
    const int64_t K = x.num_classes;
    const bool keep = keeps_exponentials(grads, K);
    RowSweep<T, T> sweep(inputs, grads, thread);
    std::vector<T> tile(kStagedRows * K), tile_gradient(g.data ? kStagedRows * K : 0), exponentials(keep ? K : 0);
    const In* rows[kStagedRows];
    In* gradients[kStagedRows];
    for (int64_t start = first; start < last; start += kStagedRows) {
        const int64_t count = std::min(kStagedRows, last - start);
        for (int64_t r = 0; r < count; ++r) {
            rows[r] = x.row<const In>(start + r);
            gradients[r] = g.data ? g.row<In>(start + r) : nullptr;
        }
        for (int64_t j = 0; j < K; ++j)
            for (int64_t r = 0; r < count; ++r) tile[r * K + j] = read_one(rows[r] + j * x.class_stride);
        for (int64_t r = 0; r < count; ++r)
            per_row(sweep, static_cast<const T*>(&tile[r * K]), start + r, keep ? exponentials.data() : nullptr,
                    g.data ? &tile_gradient[r * K] : nullptr);
        if (!g.data) continue;
        for (int64_t j = 0; j < K; ++j)
            for (int64_t r = 0; r < count; ++r) write_one(gradients[r] + j * g.class_stride, tile_gradient[r * K + j]);
    }
}

// Runs `per_row` over rows [first, last).
template <class T, class In, class PerRow>
void sweep_rows(const LogitInputs<T>& inputs, const SoftmaxGrads<T>& grads, const PerRow& per_row, int64_t first,
                int64_t last, int thread) {
    const View &x = inputs.logits, &g = grads.logits;
    const FlushSubnormals flush(g.data && g.data == x.data);
    if (x.class_stride == 1 && (!g.data || g.class_stride == 1))
        return sweep_contiguous_rows<T, In>(inputs, grads, per_row, first, last, thread);
    sweep_gathered_rows<T, In>(inputs, grads, per_row, first, last, thread);
}

// The stored type of the logits is named here and nowhere else.
template <class T, class PerRow>
void dispatch_logits(const LogitInputs<T>& inputs, const SoftmaxGrads<T>& grads, const PerRow& per_row, int64_t first,
                     int64_t last, int thread) {
    if constexpr (std::is_same_v<T, double>) {
        sweep_rows<T, double>(inputs, grads, per_row, first, last, thread);
    } else {
        switch (inputs.logits.dtype) {
            case DType::bfloat16: return sweep_rows<T, BFloat16>(inputs, grads, per_row, first, last, thread);
            case DType::float16: return sweep_rows<T, Float16>(inputs, grads, per_row, first, last, thread);
            default: return sweep_rows<T, float>(inputs, grads, per_row, first, last, thread);
        }
    }
}
