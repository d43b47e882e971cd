// Vector loops over a chunk of the classes of one row: the gradient from exp(z - max), and its column sums.

// scale * dc/dx = scale * (1 - tanh(x / cap)^2), scale null for 1.
template <class T, class In>
void soft_cap_derivative(const In* x, T cap, const T* scale, int64_t count, T* out) {
    constexpr int W = Lanes<T>::count;
    for (int64_t j = 0; j < count; j += W) {
        const int64_t left = count - j;
        const Vector<T> tanh = tanh_of((left >= W ? load(x + j) : load_first(x + j, left)) / cap);
        Vector<T> derivative = (T(1) - tanh) * (T(1) + tanh);
        if (scale) derivative *= left >= W ? load(scale + j) : load_first(scale + j, left);
        store(out + j, derivative);
    }
}

// e = softmax * e + (z < threshold ? below : 0): the gradient of softmax and hinge together.
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

// What is subtracted from softmax * e to give dL/dz_j: w_j * (smooth_loss + soft * q_j), w_j = 1 without weights.
enum class Subtract { nothing, smooth, weighted_smooth, soft, weighted_soft };

template <class T>
struct ChunkCoefficients {
    T softmax = 0, smooth_loss = 0, soft = 0;
    const T* class_weight = nullptr;
    const T* q = nullptr;
    int64_t label = -1;  // where in the chunk `label_grad` is what is written; negative for nowhere
    T label_grad = 0;
};

// Whole vectors, or the row's last partial one.
template <bool kWhole, class Element>
inline auto load_lanes(const Element* x, int64_t left) {
    if constexpr (kWhole) return load(x);
    else return load_first(x, left);
}

template <class T, Subtract kind, bool kWhole>
inline Vector<T> grad_at(const ChunkCoefficients<T>& coeffs, const T* e, int64_t j, int64_t left) {
    Vector<T> value = load_lanes<kWhole>(e + j, left) * coeffs.softmax;
    if (kind == Subtract::smooth) value -= coeffs.smooth_loss;
    if (kind == Subtract::weighted_smooth)
        value -= load_lanes<kWhole>(coeffs.class_weight + j, left) * coeffs.smooth_loss;
    if (kind == Subtract::soft || kind == Subtract::weighted_soft) {
        Vector<T> target = load_lanes<kWhole>(coeffs.q + j, left) * coeffs.soft + coeffs.smooth_loss;
        if (kind == Subtract::weighted_soft) target *= load_lanes<kWhole>(coeffs.class_weight + j, left);
        value -= target;
    }
    return value;
}

// scale * (softmax * e - subtracted), with the label's own in its place.
template <class T, Subtract kind, bool kScale, bool kWhole>
inline Vector<T> written_grad(const ChunkCoefficients<T>& coeffs, const T* e, const T* scale, int64_t j, int64_t left) {
    Vector<T> value = grad_at<T, kind, kWhole>(coeffs, e, j, left);
    if (kScale) value *= load_lanes<kWhole>(scale + j, left);
    return place<T>(value, coeffs.label - j, coeffs.label_grad);
}

// The classes before the first whole vector of a row that is written by non-temporal stores.
template <class T, class Out>
int64_t before_first_vector(const Out* gradient, int64_t count) {
    constexpr uintptr_t bytes = Lanes<T>::count * sizeof(Out);
    const uintptr_t past = reinterpret_cast<uintptr_t>(gradient) % bytes;
    return past == 0 ? 0 : std::min<int64_t>(count, (bytes - past) / sizeof(Out));
}

// Whole vectors of the gradient from class j on, as many as fit before `end`; returns the class after them.
template <class T, Subtract kind, bool kScale, bool kNonTemporal, class Out>
inline int64_t write_vectors(const ChunkCoefficients<T>& coeffs, const T* e, const T* scale, int64_t j, int64_t end,
                             Out* gradient) {
    constexpr int W = Lanes<T>::count;
    for (; j + W <= end; j += W) {
        Vector<T> value = grad_at<T, kind, true>(coeffs, e, j, W);
        if (kScale) value *= load(scale + j);
        if (kNonTemporal) store_nontemporal(gradient + j, value);
        else store(gradient + j, value);
    }
    return j;
}

// gradient = scale * (softmax * e - subtracted), and label_grad at the label. e may be the gradient itself, but not
// with non-temporal stores.
template <class T, Subtract kind, bool kScale, bool kNonTemporal, class Out>
void write_grads(const ChunkCoefficients<T>& coeffs, const T* e, const T* scale, int64_t count, Out* gradient) {
    int64_t j = 0;
    if constexpr (kNonTemporal) {
        // The label's vector by itself: to write one number over what left the caches would fetch it again.
        constexpr int W = Lanes<T>::count;
        j = before_first_vector<T>(gradient, count);
        if (j > 0) store_first(gradient, written_grad<T, kind, kScale, false>(coeffs, e, scale, 0, j), j);
        if (coeffs.label >= j) {
            j = write_vectors<T, kind, kScale, true>(coeffs, e, scale, j, coeffs.label, gradient);
            if (j + W <= count) {
                store_nontemporal(gradient + j, written_grad<T, kind, kScale, true>(coeffs, e, scale, j, W));
                j += W;
            }
        }
    }
    j = write_vectors<T, kind, kScale, kNonTemporal>(coeffs, e, scale, j, count, gradient);
    if (j < count)
        store_first(gradient + j, written_grad<T, kind, kScale, false>(coeffs, e, scale, j, count - j), count - j);
    if (!kNonTemporal && coeffs.label >= 0) write_one(gradient + coeffs.label, coeffs.label_grad);
}

// Column sums: dL/dscale += dL/dz * x, dL/dbias += dL/dz. A gradient of 0 contributes 0 even at x = -inf.
template <class T, Subtract kind, class In>
void add_columns(const ChunkCoefficients<T>& coeffs, const T* e, const In* x, int64_t count, double* scale_sum,
                 double* bias_sum) {
    constexpr int W = Lanes<T>::count;
    int64_t j = 0;
    for (; j + W <= count; j += W) {
        const Vector<T> value = grad_at<T, kind, true>(coeffs, e, j, W);
        add_widened<T>(bias_sum + j, value);
        add_product<T>(scale_sum + j, value, value == T(0) ? Vector<T>{} : load(x + j));
    }
    if (j == count) return;
    const Vector<T> grads = grad_at<T, kind, false>(coeffs, e, j, count - j), values = load_first(x + j, count - j);
    for (int lane = 0; lane < W && j + lane < count; ++lane) {
        bias_sum[j + lane] += grads[lane];
        scale_sum[j + lane] += grads[lane] == T(0) ? 0.0 : double(grads[lane]) * values[lane];
    }
}
