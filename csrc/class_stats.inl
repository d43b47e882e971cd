// Sums and squares of deviations by class. Rows come ordered by class, so the sums of a class stay in the first-level
// cache while its rows stream past: each feature is read once, and only results are written. What bounds it is the
// memory's read bandwidth. Twin of fusedloss/backends/reference/class_stats.py.

constexpr int kRowsAtOnce = 4;  // rows read side by side: their deviations are added before they are widened
constexpr int kLineBytes = 64;

typedef float HalfOfFloats __attribute__((vector_size(FUSEDLOSS_VECTOR_BYTES / 2)));

// sum[lane] += value[lane] in double, for the first `count` lanes.
inline void add_to(double* sum, FloatVector value, int64_t count) {
    constexpr int64_t W = Lanes<double>::count;
    if (count < 2 * W) {
        for (int64_t lane = 0; lane < count; ++lane) sum[lane] += value[lane];
        return;
    }
    HalfOfFloats halves[2];
    std::memcpy(halves, &value, sizeof value);
    store(sum, load(sum) + __builtin_convertvector(halves[0], Vector<double>));
    store(sum + W, load(sum + W) + __builtin_convertvector(halves[1], Vector<double>));
}
inline void add_to(double* sum, Vector<double> value, int64_t count) {
    if (count >= Lanes<double>::count) store(sum, load(sum) + value);
    else
        for (int64_t lane = 0; lane < count; ++lane) sum[lane] += value[lane];
}

// Adds kRows rows to a slot while asking the memory for the kRowsAtOnce rows after them.
template <class T, class Element, bool kPerFeature, int kRows>
void add_rows(const Element* const* rows, const T* shift, int64_t width, double* slot) {
    constexpr int W = Lanes<T>::count, kLine = kLineBytes / sizeof(Element);
    const Element* const* next = rows + kRows;
    double* square_slot = slot + width;
    double squares[W] = {};
    for (int64_t line = 0; line < width; line += kLine) {
        for (int r = 0; r < kRowsAtOnce; ++r) __builtin_prefetch(next[r] + line, 0, 2);
        const int64_t end = std::min<int64_t>(line + kLine, width);
        for (int64_t j = line; j < end; j += W) {
            const int64_t left = end - j;
            const bool whole = left >= W;
            const Vector<T> center = whole ? load(shift + j) : load_partial<T>(shift + j, left, T(0));
            Vector<T> sum = {}, square = {};
            for (int r = 0; r < kRows; ++r) {
                const Vector<T> feature = whole ? load(rows[r] + j) : load_partial<T>(rows[r] + j, left, T(0));
                const Vector<T> deviation = feature - center;
                sum += deviation;
                square += deviation * deviation;
            }
            add_to(slot + j, sum, left);
            if (kPerFeature) add_to(square_slot + j, square, left);
            else add_to(squares, square, W);
        }
    }
    if (!kPerFeature)
        for (int lane = 0; lane < W; ++lane) square_slot[0] += squares[lane];
}

template <class T, class Element>
bool row_is_usable(const Element* row, int64_t width) {
    constexpr int W = Lanes<T>::count;
    for (int64_t j = 0; j < width; j += W) {
        const Vector<T> value = width - j >= W ? load(row + j) : load_partial<T>(row + j, width - j, T(0));
        for (int lane = 0; lane < W; ++lane)
            if (!(value[lane] <= T(kLargestValue) && value[lane] >= -T(kLargestValue))) return false;
    }
    return true;
}

// Sums that small hold no row to be left out, whose square alone would be larger; a NaN is not small.
inline bool holds_usable_rows(const double* squares, int64_t count) {
    double sum = 0;
    for (int64_t j = 0; j < count; ++j) sum += squares[j];
    return sum < kLargestValue * kLargestValue / 1024;
}

// The sums once more, row by row, of usable rows alone; returns how many others there are.
template <class T, class Element, bool kPerFeature>
int64_t sum_usable_rows(const ClassStats<T>& call, const ClassSegment& segment, double* slot) {
    const int64_t width = call.width();
    std::memset(slot, 0, call.slot_size() * sizeof(double));
    int64_t skipped = 0;
    for (int64_t i = segment.first; i < segment.last; ++i) {
        const Element* rows[1 + kRowsAtOnce];
        for (const Element*& row : rows) row = call.features.template row<const Element>(call.order[i]);
        if (row_is_usable<T>(rows[0], width))
            add_rows<T, Element, kPerFeature, 1>(rows, call.shift + segment.label * width, width, slot);
        else ++skipped;
    }
    return skipped;
}

// Sums the segment's rows into a slot; returns how many rows were left out.
template <class T, class Element, bool kPerFeature>
int64_t sum_segment(const ClassStats<T>& call, const ClassSegment& segment, double* slot) {
    const int64_t width = call.width();
    const T* shift = call.shift + segment.label * width;
    std::memset(slot, 0, call.slot_size() * sizeof(double));
    const Element* rows[2 * kRowsAtOnce];
    for (int64_t i = segment.first; i < segment.last; i += kRowsAtOnce) {
        for (int r = 0; r < 2 * kRowsAtOnce; ++r)
            rows[r] = call.features.template row<const Element>(call.order[std::min(i + r, call.num_kept - 1)]);
        switch (segment.last - i) {
            case 1: add_rows<T, Element, kPerFeature, 1>(rows, shift, width, slot); break;
            case 2: add_rows<T, Element, kPerFeature, 2>(rows, shift, width, slot); break;
            case 3: add_rows<T, Element, kPerFeature, 3>(rows, shift, width, slot); break;
            default: add_rows<T, Element, kPerFeature, kRowsAtOnce>(rows, shift, width, slot);
        }
    }
    if (holds_usable_rows(slot + width, call.num_squares())) return 0;
    return sum_usable_rows<T, Element, kPerFeature>(call, segment, slot);
}

template <class T>
void write_class(const ClassStats<T>& call, int64_t label, const double* slot) {
    const int64_t width = call.width(), num_squares = call.num_squares();
    T* sum = call.sum + label * width;
    T* square = call.square + label * num_squares;
    for (int64_t j = 0; j < width; ++j) sum[j] = T(slot[j]);
    for (int64_t j = 0; j < num_squares; ++j) square[j] = T(slot[width + j]);
}

template <class T, class Element, bool kPerFeature>
void sum_segments(const ClassStats<T>& call, int64_t first, int64_t last, int thread) {
    for (int64_t index = first; index < last; ++index) {
        ClassSegment& segment = call.segments[index];
        double* slot = segment.partial < 0 ? call.scratch + thread * call.slot_size()
                                           : call.partials + segment.partial * call.slot_size();
        segment.skipped = sum_segment<T, Element, kPerFeature>(call, segment, slot);
        if (segment.partial < 0) write_class(call, segment.label, slot);
    }
}

template <class T, class Element>
void class_stats_of(const ClassStats<T>& call, int64_t first, int64_t last, int thread) {
    if (call.per_feature) sum_segments<T, Element, true>(call, first, last, thread);
    else sum_segments<T, Element, false>(call, first, last, thread);
}

// One row of features as T: gather()'s twin for a dtype that is known only at run time.
template <class T>
void widen_row(const ClassStats<T>& call, int64_t row, T* out) {
    const View& features = call.features;
    if constexpr (std::is_same_v<T, double>) {
        gather(features.template row<const double>(row), 1, call.width(), out);
    } else {
        switch (features.dtype) {
            case DType::bfloat16: return gather(features.template row<const BFloat16>(row), 1, call.width(), out);
            case DType::float16: return gather(features.template row<const Float16>(row), 1, call.width(), out);
            default: gather(features.template row<const float>(row), 1, call.width(), out);
        }
    }
}

// Segments [first, last).
template <class T>
void class_stats(const ClassStats<T>& call, int64_t first, int64_t last, int thread) {
    if constexpr (std::is_same_v<T, double>) {
        class_stats_of<double, double>(call, first, last, thread);
    } else {
        switch (call.features.dtype) {
            case DType::bfloat16: return class_stats_of<float, BFloat16>(call, first, last, thread);
            case DType::float16: return class_stats_of<float, Float16>(call, first, last, thread);
            default: class_stats_of<float, float>(call, first, last, thread);
        }
    }
}

// Chan's step with weight w: scatter += w (square - w |deviation|^2 - scatter) subtracts nothing large. Sums become
// means by a factor, for a division of each value would take most of the time.
template <class T>
void update_class(const ClassStatsUpdate<T>& call, int64_t label) {
    const int64_t width = call.width, before = call.count[label], rows = call.rows[label];
    const double weight = call.momentum < 0 ? double(rows) / (before + rows) : before == 0 ? 1.0 : call.momentum;
    const T share = T(weight), inverse = T(1.0 / rows), step = T(weight / rows);
    const T* sum = call.sum + label * width;
    double square = 0;
    if (call.variance) {
        const T* squares = call.square + label * width;
        T* variance = call.variance + label * width;
        for (int64_t j = 0; j < width; ++j) {
            const T deviation = sum[j] * inverse;
            const T moved = variance[j] + (squares[j] * inverse - deviation * deviation * share - variance[j]) * share;
            variance[j] = moved < 0 ? T(0) : moved;
        }
        for (int64_t j = 0; j < width; ++j) square += squares[j];
    } else {
        square = call.square[label];
    }
    square /= rows;
    const double distance = dot(sum, sum, width) / (double(rows) * rows);
    double& scatter = call.scatter[label];
    const double moved = scatter + (square - weight * distance - scatter) * weight;
    scatter = moved < 0 ? 0 : moved;
    const T* shift = call.shift + label * width;
    T* mean = call.mean + label * width;
    for (int64_t j = 0; j < width; ++j) mean[j] = shift[j] + sum[j] * step;
    call.count[label] = before + rows;
}

// Classes that the batch does not hold stay as they are, to the bit.
template <class T>
void update_classes(const ClassStatsUpdate<T>& call, int64_t first, int64_t last) {
    for (int64_t label = first; label < last; ++label)
        if (call.rows[label] > 0) update_class(call, label);
}

// Sum of |x| over a row: few additions in T before each in double.
template <class T, class Element>
double magnitude_of(const Element* row, int64_t width) {
    constexpr int W = Lanes<T>::count;
    constexpr int64_t kBlock = 64 * W;
    typedef Vector<T> V;
    double total = 0;
    for (int64_t start = 0; start < width; start += kBlock) {
        const int64_t end = std::min(width, start + kBlock);
        V sums[4] = {};
        int64_t j = start;
        for (; j + 4 * W <= end; j += 4 * W)
            for (int u = 0; u < 4; ++u) {
                const V value = load(row + j + u * W);
                sums[u] += larger(-value, value);
            }
        for (; j < end; j += W) {
            const V value = end - j >= W ? load(row + j) : load_partial<T>(row + j, end - j, T(0));
            sums[0] += larger(-value, value);
        }
        total += sum_lanes<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
    return total;
}

template <class T, class Element>
void row_magnitudes_of(const RowMagnitudes<T>& call, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row)
        call.sum[row] = T(magnitude_of<T>(call.rows.template row<const Element>(row), call.rows.num_classes));
}

template <class T>
void row_magnitudes(const RowMagnitudes<T>& call, int64_t first, int64_t last) {
    if constexpr (std::is_same_v<T, double>) {
        row_magnitudes_of<double, double>(call, first, last);
    } else {
        switch (call.rows.dtype) {
            case DType::bfloat16: return row_magnitudes_of<float, BFloat16>(call, first, last);
            case DType::float16: return row_magnitudes_of<float, Float16>(call, first, last);
            default: row_magnitudes_of<float, float>(call, first, last);
        }
    }
}
