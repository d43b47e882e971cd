// Probability targets: a row of them a chunk at a time, and what the loss sums over them.

// Adds sum_j w_j q_j and, where z is given, sum_j w_j q_j (z_j - shift): few additions in T before each in double.
template <class T, bool kWeight>
void soft_sums(const T* q, const T* class_weight, const T* z, T shift, int64_t count, const T* next, double& weight,
               double& product) {
    constexpr int W = Lanes<T>::count;
    constexpr int64_t kBlock = 64 * W;
    typedef Vector<T> V;
    for (int64_t start = 0; start < count; start += kBlock) {
        V weights[4] = {}, products[4] = {};
        const int64_t last = std::min(count, start + kBlock);
        int64_t j = start;
        for (; j + 4 * W <= last; j += 4 * W) {
            for (int u = 0; u < 4; ++u) {
                V value = load(q + j + u * W);
                if (next) __builtin_prefetch(next + j + u * W, 0, 2);
                if (kWeight) value *= load(class_weight + j + u * W);
                weights[u] += value;
                if (z) products[u] += weighted<T>(load(z + j + u * W), shift, value);
            }
        }
        for (; j < last; j += W) {
            const int64_t left = last - j;
            V value = left >= W ? load(q + j) : load_first(q + j, left);
            if (kWeight) value *= left >= W ? load(class_weight + j) : load_first(class_weight + j, left);
            weights[0] += value;
            if (z) products[0] += weighted<T>(load(z + j), shift, value);
        }
        weight += sum_lanes<T>((weights[0] + weights[1]) + (weights[2] + weights[3]));
        product += sum_lanes<T>((products[0] + products[1]) + (products[2] + products[3]));
    }
}

template <class T>
class SoftTargets {
public:
    explicit SoftTargets(const LogitInputs<T>& inputs)
        : inputs_(inputs),
          in_place_(inputs.probabilities.class_stride == 1 &&
                    (std::is_same_v<T, double> || inputs.probabilities.dtype == DType::float32)) {}

    // q of `width` classes, in place or copied; valid until the next call.
    const T* chunk(int64_t row, int64_t start, int64_t width) {
        const View& view = inputs_.probabilities;
        const int64_t offset = view.row_offset(row) + start * view.class_stride;
        if (in_place_) return static_cast<const T*>(view.data) + offset;
        if (row == row_ && start == start_) return q_;
        row_ = row;
        start_ = start;
        if constexpr (std::is_same_v<T, double>) copy<double>(offset, width);
        else if (view.dtype == DType::float32) copy<float>(offset, width);
        else if (view.dtype == DType::bfloat16) copy<BFloat16>(offset, width);
        else copy<Float16>(offset, width);
        return q_;
    }

    void add(int64_t row, int64_t start, int64_t width, const T* z, T shift, RowSums& sums) {
        double weight = 0, product = 0;
        add_up(row, start, width, z, shift, weight, product);
        sums.soft_weight += weight;
        sums.soft_z += product + weight * (shift - sums.reference);
    }

    // sum_j w_j q_j of a chunk.
    double weight(int64_t row, int64_t start, int64_t width) {
        double weight = 0, product = 0;
        add_up(row, start, width, nullptr, T(0), weight, product);
        return weight;
    }

    // From now on what comes next is prefetched while sums are taken.
    void prefetch() { prefetches_ = in_place_; }

private:
    void add_up(int64_t row, int64_t start, int64_t width, const T* z, T shift, double& weight, double& product) {
        const T* q = chunk(row, start, width);
        const T* next = prefetches_ ? q + distance_ahead(row) : nullptr;
        const T* w = inputs_.class_weight ? inputs_.class_weight + start : nullptr;
        if (w) soft_sums<T, true>(q, w, z, shift, width, next, weight, product);
        else soft_sums<T, false>(q, w, z, shift, width, next, weight, product);
    }

    // From a row's q to what is prefetched while it is summed; see prefetched.
    int64_t distance_ahead(int64_t row) const {
        const View& view = inputs_.probabilities;
        constexpr int64_t bytes = sizeof(T);
        if (view.num_classes * bytes > kMostPrefetched) return kPrefetchDistance / bytes;
        return row + 1 < view.num_rows() ? view.row_offset(row + 1) - view.row_offset(row) : 0;
    }

    template <class Element>
    void copy(int64_t offset, int64_t width) {
        const View& view = inputs_.probabilities;
        gather(static_cast<const Element*>(view.data) + offset, view.class_stride, width, q_);
    }

    const LogitInputs<T>& inputs_;
    const bool in_place_;
    bool prefetches_ = false;
    int64_t row_ = -1, start_ = 0;
    alignas(64) T q_[kChunk];
};
