// Vector loops over a chunk of the classes of one row: z, exp(z - max), and sums.

constexpr int64_t kChunk = 2048;                // classes of which z, e and what is per class fit the first-level cache
constexpr int64_t kKeepExponentials = 1 << 18;  // longer rows leave the second-level cache: recompute instead
// Bytes of a row for which prefetching the next one pays: below, its lines are near; above, they would not stay, and
// what is prefetched is the same row's, at this distance.
constexpr int64_t kLeastPrefetched = 1 << 10, kMostPrefetched = 1 << 17, kPrefetchDistance = 1 << 14;
constexpr int64_t kStagedRows = 16;              // rows gathered together where those in memory are not contiguous
constexpr int64_t kNonTemporalBytes = 32 << 20;  // gradients of so many would leave the caches: non-temporal stores

// z = scale * x + bias for `count` classes, padded with -inf to whole vectors; returns the largest.
template <class T, bool kScale, bool kBias, class In>
T affine(const In* x, const T* scale, const T* bias, int64_t count, T* z) {
    constexpr int W = Lanes<T>::count;
    typedef Vector<T> V;
    V top[4];
    for (V& t : top) t = V{} + kMinusInfinity<T>;
    int64_t j = 0;
    for (; j + 4 * W <= count; j += 4 * W) {
        for (int u = 0; u < 4; ++u) {
            V value = load(x + j + u * W);
            if (kScale) value *= load(scale + j + u * W);
            if (kBias) value += load(bias + j + u * W);
            store(z + j + u * W, value);
            top[u] = larger(value, top[u]);
        }
    }
    for (; j < count; j += W) {
        const int64_t left = count - j;
        V value = left >= W ? load(x + j) : load_partial<T>(x + j, left, kMinusInfinity<T>);
        if (kScale) value *= left >= W ? load(scale + j) : load_partial<T>(scale + j, left, T(1));
        if (kBias) value += left >= W ? load(bias + j) : load_partial<T>(bias + j, left, T(0));
        store(z + j, value);
        top[0] = larger(value, top[0]);
    }
    return largest_lane<T>(larger(larger(top[0], top[1]), larger(top[2], top[3])));
}

// c(x) = cap * tanh(x / cap) for `count` classes.
template <class T, class In>
void soft_capped(const In* x, T cap, int64_t count, T* out) {
    constexpr int W = Lanes<T>::count;
    int64_t j = 0;
    for (; j + W <= count; j += W) store(out + j, cap * tanh_of(load(x + j) / cap));
    if (j < count) store_first(out + j, cap * tanh_of(load_first(x + j, count - j) / cap), count - j);
}

// sum += sum of relu(threshold - z), violations += how many are below it; few additions in T before each in double.
template <class T>
void add_hinge(const T* z, T threshold, int64_t count, double& sum, double& violations) {
    constexpr int W = Lanes<T>::count;
    constexpr int64_t kBlock = 64 * W;
    for (int64_t start = 0; start < count; start += kBlock) {
        Vector<T> total = {}, below = {};
        for (int64_t j = start; j < std::min(count, start + kBlock); j += W) {
            Vector<T> gap = threshold - load(z + j);
            if (count - j < W) gap = first_lanes<T>(gap, count - j, T(0));
            // What is NaN stays.
            total += gap <= T(0) ? Vector<T>{} : gap;
            below += gap > T(0) ? Vector<T>{} + T(1) : Vector<T>{};
        }
        sum += sum_lanes<T>(total);
        violations += sum_lanes<T>(below);
    }
}

// The first class of the chunk with this z, -1 without one.
template <class T>
int64_t first_equal(const T* z, T value, int64_t start, int64_t count) {
    constexpr int64_t kBlock = 64;
    for (int64_t block = 0; block < count; block += kBlock) {
        const int64_t last = std::min(count, block + kBlock);
        // Without a way out of the loop, which is vectorised then.
        int any = 0;
        for (int64_t j = block; j < last; ++j) any |= z[j] == value;
        if (!any) continue;
        for (int64_t j = block; j < last; ++j)
            if (z[j] == value) return start + j;
    }
    return -1;
}

// The largest of z, which is padded with -inf to whole vectors.
template <class T>
T largest_of_chunk(const T* z, int64_t count) {
    Vector<T> top = Vector<T>{} + kMinusInfinity<T>;
    for (int64_t j = 0; j < count; j += Lanes<T>::count) top = larger(load(z + j), top);
    return largest_lane<T>(top);
}

// The row after this one: its cache lines are prefetched while exponentials keep the processor busy.
struct NextRow {
    const char* x = nullptr;
    const char* gradient = nullptr;

    void prefetch(int64_t byte) const {
        __builtin_prefetch(x + byte, 0, 2);
        if (gradient) __builtin_prefetch(gradient + byte, 1, 2);
    }
};

// e = exp(z - shift) for whole vectors of z; returns their sum.
template <class T, class In>
inline Vector<T> exponentials(const T* z, T shift, int64_t first, int64_t last, T* e, const NextRow* next = nullptr,
                              int64_t start = 0) {
    constexpr int W = Lanes<T>::count;
    Vector<T> sum = {};
    for (int64_t j = first; j < last; j += W) {
        const Vector<T> value = exp_nonpositive(load(z + j) - shift);
        if (next) next->prefetch((start + j) * static_cast<int64_t>(sizeof(In)));
        store(e + j, value);
        sum += value;
    }
    return sum;
}

// w * (z - shift), and 0 where w is 0.
template <class T>
inline Vector<T> weighted(Vector<T> z, T shift, Vector<T> w) {
    return w == T(0) ? Vector<T>{} : (z - shift) * w;
}

// Sum of w * (z - shift) where w is the class weight (1 without); a class of weight 0 counts 0 even at z = -inf.
template <class T>
double weighted_sum(const T* z, T shift, const T* w, int64_t count) {
    constexpr int W = Lanes<T>::count;
    Vector<T> sums[4] = {};
    int64_t j = 0;
    for (; j + 4 * W <= count; j += 4 * W)
        for (int u = 0; u < 4; ++u) {
            const Vector<T> value = load(z + j + u * W);
            sums[u] += w ? weighted<T>(value, shift, load(w + j + u * W)) : value - shift;
        }
    for (; j + W <= count; j += W) sums[0] += w ? weighted<T>(load(z + j), shift, load(w + j)) : load(z + j) - shift;
    double total = sum_lanes<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; j < count; ++j) {
        if (!w) total += z[j] - shift;
        else if (w[j] != 0) total += double(w[j]) * (z[j] - shift);
    }
    return total;
}
