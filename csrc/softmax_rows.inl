// The loop over rows, whatever their type and strides.

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

// Whether the gradient would push everything else out of the caches, and itself too before anybody reads it.
template <class In>
bool is_streamed(const View& x, const View& g) {
    const int64_t bytes = g.num_rows() * g.num_classes * static_cast<int64_t>(sizeof(In));
    return g.data && g.data != x.data && bytes >= kStreamedBytes;
}

// What to fetch while the exponentials of a row are computed: the next row, or what comes next in a long one.
template <class In>
NextRow fetched_ahead(const View& x, const View& g, int64_t row, int64_t last) {
    const int64_t bytes = x.num_classes * static_cast<int64_t>(sizeof(In));
    const bool is_long = bytes > kMostFetchedAhead;
    if (bytes < kLeastFetchedAhead || (!is_long && row + 1 == last)) return {};
    const int64_t ahead = is_long ? row : row + 1, beyond = is_long ? kFetchedAhead : 0;
    return {reinterpret_cast<const char*>(x.row<const In>(ahead)) + beyond,
            g.data ? reinterpret_cast<const char*>(g.row<In>(ahead)) + beyond : nullptr};
}

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
        const bool streams = is_streamed<In>(x, g);
        if (streams) sweep.stream_gradients();
        const bool own_buffer = keep && (!g.data || !std::is_same_v<In, T> || g.data == x.data || streams);
        std::vector<T> exponentials(own_buffer ? K : 0);
        for (int64_t row = first; row < last; ++row) {
            In* gradient = g.data ? g.row<In>(row) : nullptr;
            const NextRow next = fetched_ahead<In>(x, streams ? View() : g, row, last);
            if (next.x) sweep.set_next(next);
            T* e = own_buffer ? exponentials.data() : keep ? reinterpret_cast<T*>(gradient) : nullptr;
            per_row(sweep, x.row<const In>(row), row, e, gradient);
        }
        if (streams) stream_fence();
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
