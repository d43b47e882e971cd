// Rows of few classes: a row is a few vectors, the label is told apart by a comparison, and some rows go through each
// step together, so that the processor has another row to work on while one waits for its sum.

constexpr int kShortVectors = 8;
constexpr int64_t kRowsTogether = 8;

// Whether the short form knows everything that a call asks for.
template <class T>
bool is_short(const SoftmaxCE<T>& call) {
    const SoftmaxInputs<T>& inputs = call.inputs;
    const View &x = inputs.logits, &g = call.gradients.logits;
    if (x.num_classes > kShortVectors * Lanes<T>::count || !inputs.labels || inputs.soft_cap != 0) return false;
    if (x.class_stride != 1 || (g.data && g.class_stride != 1) || call.gradients.scale_bias) return false;
    return call.smoothing == 0 && !call.row_smoothing && call.strength == 0 && !call.row_penalty;
}

template <class T, class In, int N>
class ShortRows {
public:
    explicit ShortRows(const SoftmaxCE<T>& call) : call_(call), last_(call.inputs.logits.num_classes - (N - 1) * W) {}

    void operator()(int64_t first, int64_t last) const {
        const SoftmaxInputs<T>& inputs = call_.inputs;
        V e[kRowsTogether][N];
        Sums sums[kRowsTogether];
        Slopes slopes[kRowsTogether];
        for (int64_t row = first; row < last; ++row)
            if (!ignored(row)) sums[row - first].max = read(row, e[row - first]);
        for (int64_t row = first; row < last; ++row)
            if (!ignored(row)) exponentials(row, e[row - first], sums[row - first]);
        for (int64_t row = first; row < last; ++row) {
            if (!ignored(row)) finish(row, inputs.labels[row], sums[row - first], slopes[row - first]);
            else ignore_row(call_, row, gradient_of(row));
        }
        if (!call_.gradients.logits.data) return;
        for (int64_t row = first; row < last; ++row)
            if (!ignored(row)) write(row, e[row - first], slopes[row - first]);
    }

private:
    typedef Vector<T> V;
    static constexpr int W = Lanes<T>::count;

    // Filled and read number by number: whole structs would be copied before their parts have reached the cache.
    struct Sums {
        double max, rest, label_exp, label_z;
    };
    struct Slopes {
        T softmax, label;
    };

    template <class Element>
    V lanes(const Element* x, int n) const {
        return n < N - 1 ? load(x + n * W) : load_first(x + n * W, last_);
    }

    bool ignored(int64_t row) const { return call_.inputs.labels[row] == call_.inputs.ignore_index; }

    In* gradient_of(int64_t row) const {
        const View& g = call_.gradients.logits;
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
    T read(int64_t row, V* e) const {
        const SoftmaxInputs<T>& inputs = call_.inputs;
        if (inputs.bias || inputs.target_override) return read<true, true>(row, e);
        return inputs.scale ? read<true, false>(row, e) : read<false, false>(row, e);
    }

    template <bool kScale, bool kMore>
    T read(int64_t row, V* e) const {
        const SoftmaxInputs<T>& inputs = call_.inputs;
        const In* x = inputs.logits.template row<const In>(row);
        V top = V{} + kMinusInfinity<T>;
        for (int n = 0; n < N; ++n) {
            V z = lanes(x, n);
            if (kScale && (!kMore || inputs.scale)) z *= lanes(inputs.scale, n);
            if (kMore && inputs.bias) z += lanes(inputs.bias, n);
            if (kMore && inputs.target_override) z = is_label(row, n) ? V{} + inputs.target_override[row] : z;
            e[n] = n < N - 1 ? z : first_lanes<T>(z, last_, kMinusInfinity<T>);
            top = larger(e[n], top);
        }
        return largest_lane<T>(top);
    }

    // The lanes of vector n that hold the row's label.
    auto is_label(int64_t row, int n) const {
        typedef typename Lanes<T>::Bits Bits;
        typedef std::decay_t<decltype(Bits{}[0])> Index;
        return lane_index<T>() == Bits{} + static_cast<Index>(call_.inputs.labels[row] - n * W);
    }

    void exponentials(int64_t row, V* e, Sums& sums) const {
        const int64_t label = call_.inputs.labels[row];
        const T shift = sums.max == kMinusInfinity<double> ? T(0) : T(sums.max);
        sums.label_z = one(e, label);
        V rest = {};
        const NextRow next = next_row(row);
        for (int n = 0; n < N; ++n) {
            next.fetch(n * W * static_cast<int64_t>(sizeof(In)));
            e[n] = exp_nonpositive(e[n] - shift);
            rest += is_label(row, n) ? V{} : e[n];
        }
        sums.label_exp = one(e, label);
        sums.rest = sum_lanes<T>(rest);
    }

    void finish(int64_t row, int64_t label, const Sums& found, Slopes& slopes) const {
        RowSums sums;
        sums.max = found.max;
        sums.rest = found.rest;
        sums.label_z = found.label_z;
        sums.label_exp = found.label_exp;
        const RowSlope slope = finish_row(call_, row, label, sums, nullptr);
        slopes.softmax = T(slope.softmax / sums.sum());
        slopes.label = T(slope.label);
    }

    void write(int64_t row, const V* e, const Slopes& slopes) const {
        const SoftmaxInputs<T>& inputs = call_.inputs;
        const T* scale = inputs.scale;
        In* gradient = gradient_of(row);
        for (int n = 0; n < N; ++n) {
            V value = e[n] * slopes.softmax;
            if (scale) value *= lanes(scale, n);
            if (n < N - 1) store(gradient + n * W, value);
            else store_first(gradient + n * W, value, last_);
        }
        const int64_t label = inputs.labels[row];
        const T target_override_grad = inputs.target_override ? inputs.target_override_grad[row] : scale ? scale[label] : T(1);
        write_one(gradient + label, slopes.label * target_override_grad);
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
    for (int64_t row = first; row < last; row += kRowsTogether) rows(row, std::min(row + kRowsTogether, last));
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
