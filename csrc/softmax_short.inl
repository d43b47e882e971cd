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
        RowSums sums[kRowsTogether];
        RowSlope slopes[kRowsTogether];
        for (int64_t row = first; row < last; ++row)
            if (!ignored(row)) sums[row - first] = read(row, e[row - first]);
        for (int64_t row = first; row < last; ++row) {
            if (!ignored(row))
                slopes[row - first] = finish_row(call_, row, inputs.labels[row], sums[row - first], nullptr);
            else ignore_row(call_, row, gradient_of(row));
        }
        if (!call_.gradients.logits.data) return;
        for (int64_t row = first; row < last; ++row)
            if (!ignored(row)) write(row, e[row - first], slopes[row - first], sums[row - first].sum());
    }

private:
    typedef Vector<T> V;
    static constexpr int W = Lanes<T>::count;

    template <class Element>
    V lanes(const Element* x, int n) const {
        return n < N - 1 ? load(x + n * W) : load_first(x + n * W, last_);
    }

    bool ignored(int64_t row) const { return call_.inputs.labels[row] == call_.inputs.ignore_index; }

    In* gradient_of(int64_t row) const {
        const View& g = call_.gradients.logits;
        return g.data ? g.template row<In>(row) : nullptr;
    }

    RowSums read(int64_t row, V* e) const {
        const SoftmaxInputs<T>& inputs = call_.inputs;
        const In* x = inputs.logits.template row<const In>(row);
        const int64_t label = inputs.labels[row];
        typedef typename Lanes<T>::Bits Bits;
        const Bits from_label = lane_index<T>() - static_cast<std::decay_t<decltype(Bits{}[0])>>(label);
        V top = V{} + kMinusInfinity<T>;
        for (int n = 0; n < N; ++n) {
            V z = lanes(x, n);
            if (inputs.scale) z *= lanes(inputs.scale, n);
            if (inputs.bias) z += lanes(inputs.bias, n);
            if (inputs.label_logit) z = from_label == Bits{} - n * W ? V{} + inputs.label_logit[row] : z;
            e[n] = n < N - 1 ? z : first_lanes<T>(z, last_, kMinusInfinity<T>);
            top = larger(e[n], top);
        }
        const T max = largest_lane<T>(top);
        const T shift = max == kMinusInfinity<T> ? T(0) : max;
        V rest = {}, label_exp = {}, label_z = {};
        for (int n = 0; n < N; ++n) {
            const auto is_label = from_label == Bits{} - n * W;
            label_z = is_label ? e[n] : label_z;
            e[n] = exp_nonpositive(e[n] - shift);
            label_exp = is_label ? e[n] : label_exp;
            rest += is_label ? V{} : e[n];
        }
        RowSums sums;
        sums.max = max;
        sums.rest = sum_lanes<T>(rest);
        sums.label_exp = sum_lanes<T>(label_exp);
        sums.label_z = sum_lanes<T>(label_z);
        return sums;
    }

    void write(int64_t row, const V* e, const RowSlope& slope, double sum) const {
        const SoftmaxInputs<T>& inputs = call_.inputs;
        const T* scale = inputs.scale;
        const T factor = T(slope.softmax / sum);
        In* gradient = gradient_of(row);
        for (int n = 0; n < N; ++n) {
            V value = e[n] * factor;
            if (scale) value *= lanes(scale, n);
            if (n < N - 1) store(gradient + n * W, value);
            else store_first(gradient + n * W, value, last_);
        }
        const int64_t label = inputs.labels[row];
        const T label_slope = inputs.label_logit ? inputs.label_slope[row] : scale ? scale[label] : T(1);
        write_one(gradient + label, T(slope.label) * label_slope);
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
