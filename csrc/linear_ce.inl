// Row lengths, the Jacobian of normalisation, and the label's pair of rows in double: exact where the rows are nearly
// parallel and an angular margin is steep.

template <class Element>
void row_norms_of(const RowNorms& call, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        const Element* values = call.rows.template row<const Element>(row);
        const double square = dot(values, values, call.rows.num_classes);
        call.norm[row] = square == 0 ? HUGE_VAL : std::sqrt(square);
    }
}

template <class Element>
using Widened = std::conditional_t<std::is_same_v<Element, double>, double, float>;

// The row as it is, or widened into `buffer` where it is stored in 16 bits.
template <class Element>
const Widened<Element>* widened_row(const Element* row, int64_t count, std::vector<Widened<Element>>& buffer) {
    if constexpr (std::is_same_v<Element, Widened<Element>>) {
        return row;
    } else {
        buffer.resize(count);
        gather(row, 1, count, buffer.data());
        return buffer.data();
    }
}

// Lengths from here to the reciprocal leave quotients in the range of float.
constexpr double kSmallestPlain = 1e-12;

template <class T, class Element>
void project_rows_of(const Projection<T>& call, int64_t first, int64_t last) {
    const int64_t D = call.rows.num_classes;
    std::vector<Widened<Element>> buffer;
    for (int64_t row = first; row < last; ++row) {
        T* gradient = call.grad + row * D;
        const Widened<Element>* values = widened_row(call.rows.template row<const Element>(row), D, buffer);
        const double norm = call.norm[row];
        const double along = dot(static_cast<const T*>(gradient), values, D) / norm / norm;
        const double factor = call.divide ? 1 / norm : norm == HUGE_VAL ? 0 : 1;
        if (norm > kSmallestPlain && norm < 1 / kSmallestPlain) {
            const T share = T(along), times = T(factor);
            for (int64_t j = 0; j < D; ++j) gradient[j] = (gradient[j] - share * values[j]) * times;
        } else {
            for (int64_t j = 0; j < D; ++j) gradient[j] = T((gradient[j] - along * values[j]) * factor);
        }
    }
}

template <class Element>
void target_products_of(const TargetPairs& call, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        const int64_t label = call.label_of(row);
        call.product[row] = 0;
        if (label < 0) continue;
        const Element* x = call.input.template row<const Element>(row);
        const Element* w = call.weight.template row<const Element>(label);
        double product = dot(x, w, call.input.num_classes);
        // Two divisions: the product of two lengths may leave even the range of double.
        if (call.input_norm) product = product / call.input_norm[row] / call.class_norm[label];
        call.product[row] = product;
    }
}

// gradient += factor * (towards / its length - cosine * from / its length), or factor * towards without lengths.
template <class T, class Value>
void add_tangent(const Value* towards, double towards_norm, const Value* from, double from_norm, double cosine,
                 double factor, int64_t count, T* gradient) {
    if (towards_norm == 0) {
        for (int64_t j = 0; j < count; ++j) gradient[j] += T(factor * towards[j]);
        return;
    }
    const double along = 1 / towards_norm, back = cosine / from_norm;
    for (int64_t j = 0; j < count; ++j) gradient[j] += T(factor * (towards[j] * along - from[j] * back));
}

// Rows [first, last) of the input's gradient, or of the weight's: a thread owns what it writes.
template <class T, class Element>
void add_target_grads_of(const TargetGrads<T>& call, bool of_weight, int64_t first, int64_t last) {
    const TargetPairs& pairs = call.pairs;
    const int64_t D = pairs.input.num_classes;
    const bool cosines = pairs.input_norm != nullptr;
    const int64_t begin = of_weight ? 0 : first, end = of_weight ? pairs.input.num_rows() : last;
    std::vector<Widened<Element>> x_buffer, w_buffer;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t label = pairs.label_of(row);
        if (label < 0 || call.grad_product[row] == 0) continue;
        if (of_weight && (label < first || label >= last)) continue;
        const auto* x = widened_row(pairs.input.template row<const Element>(row), D, x_buffer);
        const auto* w = widened_row(pairs.weight.template row<const Element>(label), D, w_buffer);
        const double x_norm = cosines ? pairs.input_norm[row] : 0, w_norm = cosines ? pairs.class_norm[label] : 0;
        const double grad = call.grad_product[row], cosine = pairs.product[row];
        if (of_weight)
            add_tangent(x, x_norm, w, w_norm, cosine, cosines ? grad / w_norm : grad, D, call.weight + label * D);
        else add_tangent(w, w_norm, x, x_norm, cosine, cosines ? grad / x_norm : grad, D, call.input + row * D);
    }
}

inline void row_norms(const RowNorms& call, int64_t first, int64_t last) {
    switch (call.rows.dtype) {
        case DType::float64: return row_norms_of<double>(call, first, last);
        case DType::bfloat16: return row_norms_of<BFloat16>(call, first, last);
        case DType::float16: return row_norms_of<Float16>(call, first, last);
        default: row_norms_of<float>(call, first, last);
    }
}

template <class T>
void project_rows(const Projection<T>& call, int64_t first, int64_t last) {
    if constexpr (std::is_same_v<T, double>) {
        project_rows_of<T, double>(call, first, last);
    } else {
        switch (call.rows.dtype) {
            case DType::bfloat16: return project_rows_of<T, BFloat16>(call, first, last);
            case DType::float16: return project_rows_of<T, Float16>(call, first, last);
            default: project_rows_of<T, float>(call, first, last);
        }
    }
}

inline void target_products(const TargetPairs& call, int64_t first, int64_t last) {
    switch (call.input.dtype) {
        case DType::float64: return target_products_of<double>(call, first, last);
        case DType::bfloat16: return target_products_of<BFloat16>(call, first, last);
        case DType::float16: return target_products_of<Float16>(call, first, last);
        default: target_products_of<float>(call, first, last);
    }
}

template <class T>
void add_target_grads(const TargetGrads<T>& call, bool of_weight, int64_t first, int64_t last) {
    if constexpr (std::is_same_v<T, double>) {
        add_target_grads_of<T, double>(call, of_weight, first, last);
    } else {
        switch (call.pairs.input.dtype) {
            case DType::bfloat16: return add_target_grads_of<T, BFloat16>(call, of_weight, first, last);
            case DType::float16: return add_target_grads_of<T, Float16>(call, of_weight, first, last);
            default: add_target_grads_of<T, float>(call, of_weight, first, last);
        }
    }
}
