// Vector loops over the classes of one row, a chunk at a time: z, exp(z - max), sums, and the slopes written back.

constexpr int64_t kChunk = 2048;                // classes of which z, e and what is per class fit the first-level cache
constexpr int64_t kKeepExponentials = 1 << 18;  // longer rows leave the second-level cache: recompute instead
// Bytes of a row for which fetching the next one ahead pays: below, its lines are near; above, they would not stay, and
// what is fetched is the same row's, so far ahead.
constexpr int64_t kLeastFetchedAhead = 1 << 10, kMostFetchedAhead = 1 << 17, kFetchedAhead = 1 << 14;
constexpr int64_t kStagedRows = 16;           // rows gathered together where classes are not adjacent in memory
constexpr int64_t kStreamedBytes = 32 << 20;  // gradients of so many would leave the caches: written past them

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

// scale * dc/dx = scale * (1 - tanh(x / cap)^2), scale null for 1.
template <class T, class In>
void soft_cap_slopes(const In* x, T cap, const T* scale, int64_t count, T* out) {
    constexpr int W = Lanes<T>::count;
    for (int64_t j = 0; j < count; j += W) {
        const int64_t left = count - j;
        const Vector<T> tanh = tanh_of((left >= W ? load(x + j) : load_first(x + j, left)) / cap);
        Vector<T> slope = (T(1) - tanh) * (T(1) + tanh);
        if (scale) slope *= left >= W ? load(scale + j) : load_first(scale + j, left);
        store(out + j, slope);
    }
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

// e = softmax * e + (z < threshold ? below : 0): the slope of softmax and hinge together.
template <class T>
void fold_hinge(const T* z, T softmax, T threshold, T below, int64_t count, T* e) {
    constexpr int W = Lanes<T>::count;
    for (int64_t j = 0; j < count; j += W) {
        const int64_t left = count - j;
        const Vector<T> hinge = load(z + j) < threshold ? Vector<T>{} + below : Vector<T>{};
        if (left >= W) store(e + j, load(e + j) * softmax + hinge);
        else store_first(e + j, load_first(e + j, left) * softmax + hinge, left);
    }
}

// The first class of the chunk with this z, -1 without one.
template <class T>
int64_t first_equal(const T* z, T value, int64_t start, int64_t count) {
    constexpr int64_t kBlock = 64;
    for (int64_t block = 0; block < count; block += kBlock) {
        const int64_t last = std::min(count, block + kBlock);
        // Without a way out of the loop, which then goes by vectors.
        int found = 0;
        for (int64_t j = block; j < last; ++j) found |= z[j] == value;
        if (!found) continue;
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

// What comes next: its cache lines are asked for while exponentials keep the processor busy.
struct NextRow {
    const char* x = nullptr;
    const char* gradient = nullptr;

    void fetch(int64_t byte) const {
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
        if (next) next->fetch((start + j) * static_cast<int64_t>(sizeof(In)));
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

// What is subtracted from k * e to give the slope dL/dz: w_j * (uniform + soft * q_j).
enum class Subtract { nothing, uniform, weighted, soft, weighted_soft };

template <class T>
struct Slope {
    T softmax = 0;  // k
    T uniform = 0, soft = 0;
    const T* class_weight = nullptr;
    const T* q = nullptr;
    int64_t label = -1;  // where in the chunk `label_slope` is what is written; negative for nowhere
    T label_slope = 0;
};

// Whole vectors, or the row's last partial one.
template <bool kWhole, class Element>
inline auto load_lanes(const Element* x, int64_t left) {
    if constexpr (kWhole) return load(x);
    else return load_first(x, left);
}

template <class T, Subtract kind, bool kWhole>
inline Vector<T> slope_at(const Slope<T>& slope, const T* e, int64_t j, int64_t left) {
    Vector<T> value = load_lanes<kWhole>(e + j, left) * slope.softmax;
    if (kind == Subtract::uniform) value -= slope.uniform;
    if (kind == Subtract::weighted) value -= load_lanes<kWhole>(slope.class_weight + j, left) * slope.uniform;
    if (kind == Subtract::soft || kind == Subtract::weighted_soft) {
        Vector<T> counted = load_lanes<kWhole>(slope.q + j, left) * slope.soft + slope.uniform;
        if (kind == Subtract::weighted_soft) counted *= load_lanes<kWhole>(slope.class_weight + j, left);
        value -= counted;
    }
    return value;
}

// scale * (k * e - subtracted), with the label's own in its place.
template <class T, Subtract kind, bool kScale, bool kWhole>
inline Vector<T> written_slope(const Slope<T>& slope, const T* e, const T* scale, int64_t j, int64_t left) {
    Vector<T> value = slope_at<T, kind, kWhole>(slope, e, j, left);
    if (kScale) value *= load_lanes<kWhole>(scale + j, left);
    return place<T>(value, slope.label - j, slope.label_slope);
}

// The classes before the first whole vector of a row that is streamed.
template <class T, class Out>
int64_t before_first_vector(const Out* gradient, int64_t count) {
    constexpr uintptr_t bytes = Lanes<T>::count * sizeof(Out);
    const uintptr_t past = reinterpret_cast<uintptr_t>(gradient) % bytes;
    return past == 0 ? 0 : std::min<int64_t>(count, (bytes - past) / sizeof(Out));
}

// Whole vectors of slopes from class j on, as many as fit before `end`; returns the class after them.
template <class T, Subtract kind, bool kScale, bool kStream, class Out>
inline int64_t write_vectors(const Slope<T>& slope, const T* e, const T* scale, int64_t j, int64_t end, Out* gradient) {
    constexpr int W = Lanes<T>::count;
    for (; j + W <= end; j += W) {
        Vector<T> value = slope_at<T, kind, true>(slope, e, j, W);
        if (kScale) value *= load(scale + j);
        if (kStream) stream(gradient + j, value);
        else store(gradient + j, value);
    }
    return j;
}

// gradient = scale * (k * e - subtracted), and label_slope at the label. e may be the gradient itself, unless that is
// streamed.
template <class T, Subtract kind, bool kScale, bool kStream, class Out>
void write_slopes(const Slope<T>& slope, const T* e, const T* scale, int64_t count, Out* gradient) {
    int64_t j = 0;
    if constexpr (kStream) {
        // The label's vector by itself: to write one number over what was streamed would fetch it again.
        constexpr int W = Lanes<T>::count;
        j = before_first_vector<T>(gradient, count);
        if (j > 0) store_first(gradient, written_slope<T, kind, kScale, false>(slope, e, scale, 0, j), j);
        if (slope.label >= j) {
            j = write_vectors<T, kind, kScale, true>(slope, e, scale, j, slope.label, gradient);
            if (j + W <= count) {
                stream(gradient + j, written_slope<T, kind, kScale, true>(slope, e, scale, j, W));
                j += W;
            }
        }
    }
    j = write_vectors<T, kind, kScale, kStream>(slope, e, scale, j, count, gradient);
    if (j < count)
        store_first(gradient + j, written_slope<T, kind, kScale, false>(slope, e, scale, j, count - j), count - j);
    if (!kStream && slope.label >= 0) write_one(gradient + slope.label, slope.label_slope);
}

// Column sums: dL/dscale += slope * x, dL/dbias += slope. A slope of 0 contributes 0 even at x = -inf.
template <class T, Subtract kind, class In>
void add_columns(const Slope<T>& slope, const T* e, const In* x, int64_t count, double* scale_sum, double* bias_sum) {
    constexpr int W = Lanes<T>::count;
    int64_t j = 0;
    for (; j + W <= count; j += W) {
        const Vector<T> value = slope_at<T, kind, true>(slope, e, j, W);
        add_widened<T>(bias_sum + j, value);
        add_product<T>(scale_sum + j, value, value == T(0) ? Vector<T>{} : load(x + j));
    }
    if (j == count) return;
    const Vector<T> slopes = slope_at<T, kind, false>(slope, e, j, count - j), values = load_first(x + j, count - j);
    for (int lane = 0; lane < W && j + lane < count; ++lane) {
        bias_sum[j + lane] += slopes[lane];
        scale_sum[j + lane] += slopes[lane] == T(0) ? 0.0 : double(slopes[lane]) * values[lane];
    }
}
