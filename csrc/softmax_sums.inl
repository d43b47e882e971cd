// The sums over a row of logits, in one pass over x.

template <class T, class In>
class RowReader {
public:
    RowReader(const LogitInputs<T>& inputs, LogitChunks<T, In>& z, SoftTargets<T>& soft_targets)
        : inputs_(inputs), count_(inputs.logits.num_classes), z_(z), soft_targets_(soft_targets) {}

    // What is prefetched while a row is read.
    void set_next(NextRow next) { next_ = next; }

    // Where `e` is given, exp(z - maximum of the chunk) is kept there.
    RowSums read(const In* x, int64_t row, int64_t label, bool needs_smooth_loss, T* e) {
        RowSums sums;
        sums.has_smooth_z = needs_smooth_loss;
        chunk_max_.clear();
        for (int64_t start = 0; start < count_; start += kChunk) {
            const int64_t width = std::min(kChunk, count_ - start);
            const T chunk_max = z_.load(x, row, label, start, width);
            const T shift = chunk_max == kMinusInfinity<T> ? T(0) : chunk_max;
            chunk_max_.push_back(chunk_max);
            if (start == 0) sums.reference = shift;
            if (needs_smooth_loss) sums.smooth_z += smooth_sum(start, width, shift, sums.reference);
            if (inputs_.probabilities.data) soft_targets_.add(row, start, width, z_.data(), shift, sums);
            RowSums chunk;
            add_exponentials(shift, label - start, start, width, e ? e + start : nullptr, chunk);
            if (label >= start && label < start + width) sums.label_z = chunk.label_z;
            if (double(chunk_max) > sums.max) {
                if (start != 0) sums.rescale(sums.max - chunk_max);
                sums.max = chunk_max;
            } else if (chunk_max != kMinusInfinity<T>) {
                chunk.rescale(chunk_max - sums.max);
            }
            sums.other_sum += chunk.other_sum;
            sums.label_exp += chunk.label_exp;
        }
        return sums;
    }

    // The maximum of a chunk of the row that was read last.
    T chunk_max(int64_t chunk) const { return chunk_max_[chunk]; }

    // sum_k relu(max z - z_k - margin).
    HingeSums hinge(const In* x, int64_t row, int64_t label, double max, double margin) {
        HingeSums hinge;
        hinge.threshold = max - margin;
        for (int64_t start = 0; start < count_; start += kChunk) {
            const int64_t width = std::min(kChunk, count_ - start);
            z_.hold(x, row, label, start, width);
            const T* z = z_.data();
            add_hinge(z, T(hinge.threshold), width, hinge.sum, hinge.violations);
            if (hinge.largest < 0) hinge.largest = first_equal(z, T(max), start, width);
            if (label >= start && label < start + width) hinge.label_violates = z[label - start] < hinge.threshold;
        }
        return hinge;
    }

    struct Prediction {
        int64_t index = 0;
        double confidence = 0;
    };

    // The first largest class of z, or the first NaN, and its probability; without target_override. Follows read().
    Prediction prediction(const In* x, int64_t label, const RowSums& sums) {
        Prediction top;
        double max = sums.max, sum = sums.sum();
        if (inputs_.target_override && label >= 0) {
            for (int64_t start = 0, chunk = 0; start < count_; start += kChunk, ++chunk)
                chunk_max_[chunk] = z_.load_plain(x, start, std::min(kChunk, count_ - start));
            max = *std::max_element(chunk_max_.begin(), chunk_max_.end());
            const double others = sums.other_sum == 0 ? 0.0 : sums.other_sum * std::exp(sums.max - max);
            sum = others + std::exp(z_.plain(x, label) - max);
        }
        top.confidence = sum == 0 ? std::numeric_limits<double>::quiet_NaN() : 1 / sum;
        top.index = first_class(x, max, std::isnan(sum));
        return top;
    }

    // p of the label, from the row's maximum and sum.
    double probability(const In* x, int64_t row, int64_t label, double max, double sum) const {
        const double z = inputs_.target_override ? double(inputs_.target_override[row]) : z_.plain(x, label);
        return std::exp(z - (max == -HUGE_VAL ? 0.0 : max)) / sum;
    }

    // sum_j w_j q_j.
    double soft_weight(int64_t row) {
        double weight = 0;
        for (int64_t start = 0; start < count_; start += kChunk)
            weight += soft_targets_.weight(row, start, std::min(kChunk, count_ - start));
        return weight;
    }

private:
    // The first class with this z, or the first NaN; 0 without one.
    int64_t first_class(const In* x, double max, bool of_nan) {
        for (int64_t start = 0, chunk = 0; start < count_; start += kChunk, ++chunk) {
            if (!of_nan && chunk_max_[chunk] != max) continue;
            const int64_t width = std::min(kChunk, count_ - start);
            z_.load_plain(x, start, width);
            const T* z = z_.data();
            for (int64_t j = 0; j < width; ++j)
                if (of_nan ? std::isnan(z[j]) : z[j] == max) return start + j;
        }
        return 0;
    }

    // The label's vector is summed separately, so that 1 - p of a confident row keeps its digits.
    void add_exponentials(T shift, int64_t label, int64_t start, int64_t width, T* e, RowSums& chunk) {
        const NextRow* next = next_.x ? &next_ : nullptr;
        constexpr int64_t W = Lanes<T>::count;
        T* z = z_.data();
        const int64_t whole = width / W * W;
        const bool has_label = label >= 0 && label < width;
        if (has_label) chunk.label_z = z[label];
        const int64_t label_vector = has_label ? label / W * W : whole;
        T* target = e ? e : z;
        if (!e) z_.forget();
        Vector<T> sum = exponentials<T, In>(z, shift, 0, std::min(label_vector, whole), target, next, start);
        if (label_vector < whole) {
            const Vector<T> value = exp_nonpositive(load(z + label_vector) - shift);
            store(target + label_vector, value);
            Vector<T> others = value;
            chunk.label_exp = value[label % W];
            others[label % W] = 0;
            sum += others;
            sum += exponentials<T, In>(z, shift, label_vector + W, whole, target, next, start);
        }
        if (whole < width) {
            Vector<T> value = exp_nonpositive(load(z + whole) - shift);
            store_partial<T>(target + whole, value, width - whole);
            if (has_label && label >= whole) {
                chunk.label_exp = value[label - whole];
                value[label - whole] = 0;
            }
            sum += value;
        }
        chunk.other_sum = sum_lanes<T>(sum);
    }

    double smooth_sum(int64_t start, int64_t width, T shift, double reference) {
        const T* weight = inputs_.class_weight ? inputs_.class_weight + start : nullptr;
        return weighted_sum(z_.data(), shift, weight, width) + chunk_weight(start, width) * (shift - reference);
    }

    // Sum of the class weights of a chunk, added up once.
    double chunk_weight(int64_t start, int64_t width) {
        if (!inputs_.class_weight) return width;
        if (count_ <= kChunk) return inputs_.weight_sum;
        const int64_t chunk = start / kChunk;
        if (chunk == int64_t(chunk_weights_.size()))
            chunk_weights_.push_back(
                std::accumulate(inputs_.class_weight + start, inputs_.class_weight + start + width, 0.0));
        return chunk_weights_[chunk];
    }

    const LogitInputs<T>& inputs_;
    const int64_t count_;
    LogitChunks<T, In>& z_;
    SoftTargets<T>& soft_targets_;
    NextRow next_;
    std::vector<T> chunk_max_;
    std::vector<double> chunk_weights_;
};
