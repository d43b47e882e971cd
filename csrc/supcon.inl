// Supervised contrast on panels of similarities: maxima, sums and gradients, each pair in both directions at once. Twin
// of fusedloss/backends/reference/supcon.py.

constexpr int64_t kTileRows = 32;  // rows added up in T before their column sums are widened

template <class T>
using Bits = typename Lanes<T>::Bits;

// `count` elements of any integer type as lanes of T's width, 0 in the others.
template <class T, class Integer>
inline Bits<T> load_integers(const Integer* from, int64_t count) {
    typedef Integer Packed __attribute__((vector_size(sizeof(Integer) * Lanes<T>::count)));
    Packed packed = {};
    if (count >= Lanes<T>::count) std::memcpy(&packed, from, sizeof packed);
    else std::memcpy(&packed, from, count * sizeof(Integer));
    return __builtin_convertvector(packed, Bits<T>);
}

// Up to a whole vector of a row; `fill` beyond the row's end.
template <class T>
inline Vector<T> load_some(const T* x, int64_t count, T fill) {
    return count >= Lanes<T>::count ? load(x) : load_partial<T>(x, count, fill);
}

template <class T>
inline void store_some(T* x, Vector<T> value, int64_t count) {
    if (count >= Lanes<T>::count) store(x, value);
    else store_partial<T>(x, value, count);
}

// exp(s - shift), at most 1: a largest similarity is that of its own panel, to the bit.
template <class T>
inline Vector<T> exp_below(Vector<T> s, Vector<T> shift) {
    const Vector<T> x = s - shift;
    return exp_nonpositive(x > 0 ? Vector<T>{} : x);
}

// Positives by label: the same columns in both directions.
template <class T>
struct LabelMatch {
    static constexpr bool kSymmetric = true;
    const int32_t* codes;
    Bits<T> code;

    LabelMatch(const SupConPanel<T>& panel, int64_t row) : codes(panel.codes), code(Bits<T>{} + panel.codes[row]) {}
    Bits<T> forward(int64_t column, int64_t count) const { return load_integers<T>(codes + column, count) == code; }
    Bits<T> back(int64_t, int64_t, Bits<T> forward) const { return forward; }
};

template <class T>
struct MaskMatch {
    static constexpr bool kSymmetric = false;
    const uint8_t *mask, *mask_back;

    MaskMatch(const SupConPanel<T>& panel, int64_t row)
        : mask(panel.mask + (row - panel.first) * panel.columns - panel.first),
          mask_back(panel.mask_back + (row - panel.first) * panel.columns - panel.first) {}
    Bits<T> forward(int64_t column, int64_t count) const { return load_integers<T>(mask + column, count) != 0; }
    Bits<T> back(int64_t column, int64_t count, Bits<T>) const {
        return load_integers<T>(mask_back + column, count) != 0;
    }
};

// Row and column maxima over the pairs of rows [begin, end); column_max holds one value per column of the panel.
template <class T>
void supcon_maxima(const SupConPanel<T>& panel, int64_t begin, int64_t end, T* column_max) {
    constexpr int64_t W = Lanes<T>::count;
    for (int64_t row = begin; row < end; ++row) {
        const T* s = panel.row(row) - panel.first;
        const T* weight = panel.negative_weight;
        const T lowest = kMinusInfinity<T>;
        const T row_weight = weight ? weight[row] : T(1);
        Vector<T> top = Vector<T>{} + lowest;
        for (int64_t j = row + 1; j < panel.last(); j += W) {
            const int64_t count = panel.last() - j;
            const Vector<T> value = load_some(s + j, count, lowest);
            T* column = column_max + (j - panel.first);
            // What has no weight does not count.
            const Vector<T> candidate =
                weight ? (load_some(weight + j, count, T(0)) > 0 ? value : Vector<T>{} + lowest) : value;
            top = larger(candidate, top);
            if (row_weight > 0) store_some(column, larger(value, load_some(column, count, lowest)), count);
        }
        panel.row_shift[row] = std::max(panel.row_shift[row], largest_lane<T>(top));
    }
}

// Columns [begin, end) of one row: adds to the row's two sums (in double, from the panel's first row on) and to the
// columns' (in T).
template <class T, class Match, bool kCommon, bool kWeighted>
inline void add_tile(const SupConPanel<T>& panel, int64_t row, int64_t begin, int64_t end, SupConSums sums,
                     T* column_exp, T* column_positive) {
    typedef Vector<T> V;
    constexpr int64_t W = Lanes<T>::count;
    const T* s = panel.row(row) - panel.first;
    const Match match(panel, row);
    const V shift = V{} + (kCommon ? panel.common_shift : panel.row_shift[row]);
    V row_exp = {}, row_positive = {};
    V row_negative_weight = {}, row_positive_weight = {}, row_share = {};
    if (kWeighted) {
        row_negative_weight += panel.negative_weight[row];
        row_positive_weight += panel.positive_weight[row];
        row_share += panel.share[row];
    }
    for (int64_t j = begin; j < end; j += W) {
        const int64_t count = end - j;
        const V value = load_some(s + j, count, kMinusInfinity<T>);
        const V e = exp_below<T>(value, shift);
        Bits<T> positive = match.forward(j, count);
        if (count < W)
            positive &= lane_index<T>() < Bits<T>{} + static_cast<std::decay_t<decltype(Bits<T>{}[0])>>(count);
        Bits<T> back = match.back(j, count, positive);
        if (!Match::kSymmetric && count < W)
            back &= lane_index<T>() < Bits<T>{} + static_cast<std::decay_t<decltype(Bits<T>{}[0])>>(count);
        const V back_shift = kCommon ? shift : load_some(panel.row_shift + j, count, T(0));
        const V e_back = kCommon ? e : exp_below<T>(value, back_shift);
        const V relative = positive ? value - shift : V{};
        const V relative_back = kCommon && Match::kSymmetric ? relative : back ? value - back_shift : V{};
        T *to_exp = column_exp + (j - begin), *to_positive = column_positive + (j - begin);
        if (kWeighted) {
            const V weight = positive ? load_some(panel.positive_weight + j, count, T(0))
                                      : load_some(panel.negative_weight + j, count, T(0));
            row_exp += e * weight;
            row_positive += relative * load_some(panel.share + j, count, T(0));
            store(to_exp, load(to_exp) + e_back * (back ? row_positive_weight : row_negative_weight));
            store(to_positive, load(to_positive) + relative_back * row_share);
        } else {
            row_exp += e;
            row_positive += relative;
            store(to_exp, load(to_exp) + e_back);
            store(to_positive, load(to_positive) + relative_back);
        }
    }
    sums.exponentials[row - panel.first] += sum_lanes<T>(row_exp);
    sums.positives[row - panel.first] += sum_lanes<T>(row_positive);
}

// Columns [begin, end), at most kSupConTileColumns, of all rows of the panel: what they add to the rows' sums (from the
// panel's first row on), and the columns' own. One call sees all rows of a column, in order, so that no sum depends on
// how many threads there are.
template <class T, class Match, bool kCommon, bool kWeighted>
void add_columns_of(const SupConPanel<T>& panel, int64_t begin, int64_t end, SupConSums rows, SupConSums columns) {
    constexpr int64_t W = Lanes<T>::count;
    alignas(64) T column_exp[kSupConTileColumns + W], column_positive[kSupConTileColumns + W];
    // Rows from the last column on have no pair above the diagonal here.
    const int64_t last_row = std::min(panel.first + panel.rows, end - 1);
    for (int64_t group = panel.first; group < last_row; group += kTileRows) {
        const int64_t group_end = std::min(group + kTileRows, last_row);
        std::memset(column_exp, 0, (end - begin + W) * sizeof(T));
        std::memset(column_positive, 0, (end - begin + W) * sizeof(T));
        for (int64_t row = group; row < group_end; ++row) {
            const int64_t start = std::max(begin, row + 1), skipped = start - begin;
            add_tile<T, Match, kCommon, kWeighted>(panel, row, start, end, rows, column_exp + skipped,
                                                   column_positive + skipped);
        }
        for (int64_t j = begin; j < end; ++j) {
            columns.exponentials[j] += column_exp[j - begin];
            columns.positives[j] += column_positive[j - begin];
        }
    }
}

template <class T, class Match, bool kCommon, bool kWeighted>
double backward_rows_of(const SupConPanel<T>& panel, int64_t begin, int64_t end, SupConCoefficients<T> coefficients) {
    typedef Vector<T> V;
    constexpr int64_t W = Lanes<T>::count;
    double total = 0;
    for (int64_t row = begin; row < end; ++row) {
        T* s = panel.row(row) - panel.first;
        std::memset(s + panel.first, 0, (row + 1 - panel.first) * sizeof(T));
        const Match match(panel, row);
        const V shift = V{} + (kCommon ? panel.common_shift : panel.row_shift[row]);
        const V softmax = V{} + coefficients.softmax[row], positive_coefficient = V{} + coefficients.positive[row];
        V moment = {};
        for (int64_t j = row + 1; j < panel.last(); j += W) {
            const int64_t count = panel.last() - j;
            const V value = load_some(s + j, count, T(0));
            const V back_shift = kCommon ? shift : load_some(panel.row_shift + j, count, T(0));
            const V e = exp_below<T>(value, shift), e_back = kCommon ? e : exp_below<T>(value, back_shift);
            const Bits<T> positive = match.forward(j, count);
            const Bits<T> back = match.back(j, count, positive);
            V forward_grad = e * softmax, back_grad = e_back * load_some(coefficients.softmax + j, count, T(0));
            V forward_positive = positive_coefficient,
              back_positive = load_some(coefficients.positive + j, count, T(0));
            if (kWeighted) {
                forward_grad *= positive ? load_some(panel.positive_weight + j, count, T(0))
                                         : load_some(panel.negative_weight + j, count, T(0));
                back_grad *= back ? V{} + panel.positive_weight[row] : V{} + panel.negative_weight[row];
                forward_positive *= load_some(panel.share + j, count, T(0));
                back_positive *= panel.share[row];
            }
            forward_grad -= positive ? forward_positive : V{};
            back_grad -= back ? back_positive : V{};
            const V grad = forward_grad + back_grad;
            // A row's gradients add up to 0, so that any reference will do: one near the values keeps the digits.
            const V part =
                kCommon ? grad * (value - shift) : forward_grad * (value - shift) + back_grad * (value - back_shift);
            moment += count < W ? first_lanes<T>(part, count, T(0)) : part;
            store_some(s + j, grad, count);
        }
        total += sum_lanes<T>(moment);
    }
    return total;
}

// The variant of add_columns_of: a common shift or one per row, weights or none, labels or a mask (which has no
// weights).
template <class T>
void supcon_sums(const SupConPanel<T>& panel, int64_t begin, int64_t end, SupConSums rows, SupConSums columns) {
    const bool common = panel.row_shift == nullptr, weighted = panel.negative_weight != nullptr;
    if (panel.mask)
        return common ? add_columns_of<T, MaskMatch<T>, true, false>(panel, begin, end, rows, columns)
                      : add_columns_of<T, MaskMatch<T>, false, false>(panel, begin, end, rows, columns);
    if (weighted)
        return common ? add_columns_of<T, LabelMatch<T>, true, true>(panel, begin, end, rows, columns)
                      : add_columns_of<T, LabelMatch<T>, false, true>(panel, begin, end, rows, columns);
    return common ? add_columns_of<T, LabelMatch<T>, true, false>(panel, begin, end, rows, columns)
                  : add_columns_of<T, LabelMatch<T>, false, false>(panel, begin, end, rows, columns);
}

// Overwrites rows [begin, end) with gradients, zero up to the diagonal; returns the sum of gradient * (s - shift).
template <class T>
double supcon_backward(const SupConPanel<T>& panel, int64_t begin, int64_t end, SupConCoefficients<T> coefficients) {
    const bool common = panel.row_shift == nullptr, weighted = panel.negative_weight != nullptr;
    if (panel.mask)
        return common ? backward_rows_of<T, MaskMatch<T>, true, false>(panel, begin, end, coefficients)
                      : backward_rows_of<T, MaskMatch<T>, false, false>(panel, begin, end, coefficients);
    if (weighted)
        return common ? backward_rows_of<T, LabelMatch<T>, true, true>(panel, begin, end, coefficients)
                      : backward_rows_of<T, LabelMatch<T>, false, true>(panel, begin, end, coefficients);
    return common ? backward_rows_of<T, LabelMatch<T>, true, false>(panel, begin, end, coefficients)
                  : backward_rows_of<T, LabelMatch<T>, false, false>(panel, begin, end, coefficients);
}
