// Rows of few classes: a row is a few vectors, a comparison tells the label's lane, and some rows go through each step
// together, so that the processor has another row to work on while one waits for its sum.

constexpr int kShortVectors = 8;
constexpr int64_t kRowsTogether = 8;

// Whether ShortRows has everything that a call needs.
template <class T>
bool is_short(const SoftmaxCE<T>& call) {
    const LogitInputs<T>& inputs = call.inputs;
    const View &x = inputs.logits, &g = call.grads.logits;
    if (x.num_classes > kShortVectors * Lanes<T>::count || !inputs.labels || inputs.soft_cap != 0) return false;
    if (x.class_stride != 1 || (g.data && g.class_stride != 1) || call.grads.scale_bias) return false;
    return !call.needs_smooth_loss() && !call.needs_hinge();
}

template <class T, class In, int N>
class ShortRows {
public:
    explicit ShortRows(const SoftmaxCE<T>& call) : call_(call), last_(call.inputs.logits.num_classes - (N - 1) * W) {}

    // Rows [first, first + count), no more than kRowsTogether.
    void operator()(int64_t first, int64_t count) const {
        int64_t labels[kRowsTogether];
        V e[kRowsTogether][N];
        Sums sums[kRowsTogether];
        Coefficients coeffs[kRowsTogether];
        for (int64_t i = 0; i < count; ++i) labels[i] = call_.inputs.label_of(first + i);
        for (int64_t i = 0; i < count; ++i)
            if (labels[i] >= 0) sums[i].max = read(first + i, labels[i], e[i]);
        for (int64_t i = 0; i < count; ++i)
            if (labels[i] >= 0) exponentials(first + i, labels[i], e[i], sums[i]);
        for (int64_t i = 0; i < count; ++i) {
            if (labels[i] >= 0) finish(first + i, labels[i], sums[i], coeffs[i]);
            else ignore_row(call_, first + i, gradient_of(first + i));
        }
        if (!call_.grads.logits.data) return;
        for (int64_t i = 0; i < count; ++i)
            if (labels[i] >= 0) write(first + i, labels[i], e[i], coeffs[i]);
    }

private:
    typedef Vector<T> V;
    static constexpr int W = Lanes<T>::count;

    // Filled and read number by number: whole structs would be copied before their parts have reached the cache.
    struct Sums {
        double max, other_sum, label_exp, label_z;
    };
    struct Coefficients {
        T softmax, label;
    };

    template <class Element>
    V lanes(const Element* x, int n) const {
        return n < N - 1 ? load(x + n * W) : load_first(x + n * W, last_);
    }

    In* gradient_of(int64_t row) const {
        const View& g = call_.grads.logits;
        return g.data ? g.template row<In>(row) : nullptr;
    }

    // The row in this one's place in the group to come.
    NextRow next_row(int64_t row) const {
        const View& x = call_.inputs.logits;
        const int64_t ahead = std::min(row + kRowsTogether, x.num_rows() - 1);
        return {reinterpret_cast<const char*>(x.template row<const In>(ahead)),
                reinterpret_cast<const char*>(gradient_of(ahead))};
    }

    // z of a row; returns its maximum.
    T read(int64_t row, int64_t label, V* e) const {
        const LogitInputs<T>& inputs = call_.inputs;
        if (inputs.bias || inputs.target_override) return read<true, true>(row, label, e);
        return inputs.scale ? read<true, false>(row, label, e) : read<false, false>(row, label, e);
    }

    template <bool kScale, bool kMore>
    T read(int64_t row, int64_t label, V* e) const {
        const LogitInputs<T>& inputs = call_.inputs;
        const In* x = inputs.logits.template row<const In>(row);
        V top = V{} + kMinusInfinity<T>;
        for (int n = 0; n < N; ++n) {
            V z = lanes(x, n);
            if (kScale && (!kMore || inputs.scale)) z *= lanes(inputs.scale, n);
            if (kMore && inputs.bias) z += lanes(inputs.bias, n);
            if (kMore && inputs.target_override) z = is_label(label, n) ? V{} + inputs.target_override[row] : z;
            e[n] = n < N - 1 ? z : first_lanes<T>(z, last_, kMinusInfinity<T>);
            top = larger(e[n], top);
        }
        return largest_lane<T>(top);
    }

    // The lanes of vector n that hold the label.
    static auto is_label(int64_t label, int n) {
        typedef typename Lanes<T>::Bits Bits;
        typedef std::decay_t<decltype(Bits{}[0])> Index;
        return lane_index<T>() == Bits{} + static_cast<Index>(label - n * W);
    }

    void exponentials(int64_t row, int64_t label, V* e, Sums& sums) const {
        const T shift = sums.max == kMinusInfinity<double> ? T(0) : T(sums.max);
        sums.label_z = one(e, label);
        V others = {};
        const NextRow next = next_row(row);
        for (int n = 0; n < N; ++n) {
            next.prefetch(n * W * static_cast<int64_t>(sizeof(In)));
            e[n] = exp_nonpositive(e[n] - shift);
            others += is_label(label, n) ? V{} : e[n];
        }
        sums.label_exp = one(e, label);
        sums.other_sum = sum_lanes<T>(others);
    }

    void finish(int64_t row, int64_t label, const Sums& found, Coefficients& coeffs) const {
        RowSums sums;
        sums.max = found.max;
        sums.other_sum = found.other_sum;
        sums.label_z = found.label_z;
        sums.label_exp = found.label_exp;
        const GradCoefficients grad = finish_row(call_, row, label, sums, call_.options, nullptr);
        coeffs.softmax = T(grad.softmax / sums.sum());
        coeffs.label = T(grad.label);
    }

    void write(int64_t row, int64_t label, const V* e, const Coefficients& coeffs) const {
        const LogitInputs<T>& inputs = call_.inputs;
        const T* scale = inputs.scale;
        In* gradient = gradient_of(row);
        for (int n = 0; n < N; ++n) {
            V value = e[n] * coeffs.softmax;
            if (scale) value *= lanes(scale, n);
            if (n < N - 1) store(gradient + n * W, value);
            else store_first(gradient + n * W, value, last_);
        }
        const T derivative = inputs.target_override ? inputs.target_override_grad[row] : scale ? scale[label] : T(1);
        write_one(gradient + label, coeffs.label * derivative);
    }

    static T one(const V* e, int64_t class_index) {
        T value;
        std::memcpy(&value, reinterpret_cast<const char*>(e) + class_index * sizeof(T), sizeof value);
        return value;
    }

    const SoftmaxCE<T>& call_;
    const int64_t last_;
};

template <class T, class In, int N>
void short_rows(const SoftmaxCE<T>& call, int64_t first, int64_t last) {
    if ((N - 1) * Lanes<T>::count >= call.inputs.logits.num_classes) {
        if constexpr (N > 1) return short_rows<T, In, N - 1>(call, first, last);
    }
    const ShortRows<T, In, N> rows(call);
    for (int64_t row = first; row < last; row += kRowsTogether) rows(row, std::min(kRowsTogether, last - row));
}

template <class T>
void short_rows(const SoftmaxCE<T>& call, int64_t first, int64_t last) {
    if constexpr (std::is_same_v<T, double>) {
        short_rows<T, double, kShortVectors>(call, first, last);
    } else {
        switch (call.inputs.logits.dtype) {
            case DType::bfloat16: return short_rows<T, BFloat16, kShortVectors>(call, first, last);
            case DType::float16: return short_rows<T, Float16, kShortVectors>(call, first, last);
            default: return short_rows<T, float, kShortVectors>(call, first, last);
        }
    }
}
