// Vector arithmetic on one row, written once and compiled once per SIMD level: loads and stores that widen and
// round, the exponential, and sums. FUSEDLOSS_VECTOR_BYTES is the width of the level's registers.

template <class T>
struct Lanes;

template <>
struct Lanes<float> {
    static constexpr int count = FUSEDLOSS_VECTOR_BYTES / 4;
    typedef float Vector __attribute__((vector_size(FUSEDLOSS_VECTOR_BYTES)));
    typedef int32_t Bits __attribute__((vector_size(FUSEDLOSS_VECTOR_BYTES)));
    typedef uint16_t Half __attribute__((vector_size(FUSEDLOSS_VECTOR_BYTES / 2)));
    typedef uint32_t Word __attribute__((vector_size(FUSEDLOSS_VECTOR_BYTES)));
};

template <>
struct Lanes<double> {
    static constexpr int count = FUSEDLOSS_VECTOR_BYTES / 8;
    typedef double Vector __attribute__((vector_size(FUSEDLOSS_VECTOR_BYTES)));
    typedef int64_t Bits __attribute__((vector_size(FUSEDLOSS_VECTOR_BYTES)));
};

template <class T>
using Vector = typename Lanes<T>::Vector;

using FloatVector = Vector<float>;
using WordVector = Lanes<float>::Word;
using HalfVector = Lanes<float>::Half;

template <class T>
constexpr T kMinusInfinity = -std::numeric_limits<T>::infinity();

template <class V, class From>
inline V load_as(const From* from) {
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline FloatVector widen(WordVector words) {
    FloatVector value;
    std::memcpy(&value, &words, sizeof value);
    return value;
}

inline WordVector bits_of(FloatVector value) {
    WordVector words;
    std::memcpy(&words, &value, sizeof words);
    return words;
}

// Loads Lanes<T>::count elements of any stored type.
inline FloatVector load(const float* x) { return load_as<FloatVector>(x); }
inline Vector<double> load(const double* x) { return load_as<Vector<double>>(x); }
inline FloatVector load(const BFloat16* x) {
    return widen(__builtin_convertvector(load_as<HalfVector>(x), WordVector) << 16);
}
inline FloatVector load(const Float16* x) {
    const WordVector half = __builtin_convertvector(load_as<HalfVector>(x), WordVector);
    const WordVector exponent_mask = WordVector{} + (0x7c00u << 13);
    WordVector magnitude = (half & 0x7fffu) << 13;
    const WordVector exponent = magnitude & exponent_mask;
    magnitude += (127u - 15u) << 23;
    const WordVector special = magnitude + ((128u - 16u) << 23);
    const FloatVector subnormal = widen(magnitude + (1u << 23)) - widen(WordVector{} + (113u << 23));
    magnitude = exponent == exponent_mask ? special : magnitude;
    magnitude = exponent == WordVector{} ? bits_of(subnormal) : magnitude;
    return widen(magnitude | ((half & 0x8000u) << 16));
}

inline void store(float* x, FloatVector value) { std::memcpy(x, &value, sizeof value); }
inline void store(double* x, Vector<double> value) { std::memcpy(x, &value, sizeof value); }
inline void store_half(uint16_t* x, WordVector words) {
    const HalfVector half = __builtin_convertvector(words, HalfVector);
    std::memcpy(x, &half, sizeof half);
}
inline void store(BFloat16* x, FloatVector value) {
    const WordVector words = bits_of(value);
    const WordVector rounded = (words + 0x7fffu + ((words >> 16) & 1u)) >> 16;
    store_half(&x->bits, value == value ? rounded : (words >> 16) | 0x40u);
}
inline void store(Float16* x, FloatVector value) {
    const WordVector words = bits_of(value);
    const WordVector sign = words & 0x80000000u;
    const WordVector magnitude = words ^ sign;
    const WordVector overflow = WordVector{} + ((127u + 16u) << 23);
    const WordVector infinity = WordVector{} + (255u << 23);
    // Adding 0.5 shifts a subnormal's bits into place and rounds them to even.
    const WordVector subnormal = bits_of(widen(magnitude) + 0.5f) - (126u << 23);
    const WordVector normal = (magnitude - ((127u - 15u) << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    WordVector half = magnitude < (WordVector{} + (113u << 23)) ? subnormal : normal;
    half = magnitude >= overflow ? WordVector{} + 0x7c00u : half;
    half = magnitude > infinity ? WordVector{} + 0x7e00u : half;
    store_half(&x->bits, half | (sign >> 16));
}

// A store to an address that is a multiple of the stored vector's size, non-temporal where the machine can;
// nontemporal_fence() makes what was written so seen by other threads.
template <class Element, class V>
inline void store_nontemporal(Element* x, V value) {
    Element packed[sizeof(V) / sizeof(value[0])];
    store(packed, value);
#if defined(__x86_64__)
    if constexpr (sizeof packed == 64)
        return _mm512_stream_si512(reinterpret_cast<__m512i*>(x), load_as<__m512i>(packed));
    else if constexpr (sizeof packed == 32)
        return _mm256_stream_si256(reinterpret_cast<__m256i*>(x), load_as<__m256i>(packed));
    else if constexpr (sizeof packed == 16)
        return _mm_stream_si128(reinterpret_cast<__m128i*>(x), load_as<__m128i>(packed));
#endif
    std::memcpy(x, packed, sizeof packed);
}

inline void nontemporal_fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

template <class T>
inline typename Lanes<T>::Bits lane_index() {
    typename Lanes<T>::Bits index;
    for (int lane = 0; lane < Lanes<T>::count; ++lane) index[lane] = lane;
    return index;
}

// The first `count` lanes of `value`, `fill` in the others.
template <class T>
inline Vector<T> first_lanes(Vector<T> value, int64_t count, T fill) {
    typedef typename Lanes<T>::Bits Bits;
    return lane_index<T>() < (Bits{} + static_cast<std::decay_t<decltype(Bits{}[0])>>(count)) ? value
                                                                                              : Vector<T>{} + fill;
}

// `value` with `one` in place of the lane, if it is one.
template <class T>
inline Vector<T> place(Vector<T> value, int64_t lane, T one) {
    typedef typename Lanes<T>::Bits Bits;
    if (static_cast<uint64_t>(lane) >= uint64_t(Lanes<T>::count)) return value;
    return lane_index<T>() == (Bits{} + static_cast<std::decay_t<decltype(Bits{}[0])>>(lane)) ? Vector<T>{} + one
                                                                                              : value;
}

// The last, partial vector of a row: `count` elements, never touching memory beyond them.
template <class Element>
inline auto load_first(const Element* x, int64_t count) {
    constexpr int W = sizeof(load(x)) / sizeof(load(x)[0]);
    Element padded[W] = {};
    std::memcpy(padded, x, count * sizeof(Element));
    return load(padded);
}

template <class Element, class V>
inline void store_first(Element* x, V value, int64_t count) {
    constexpr int W = sizeof(V) / sizeof(value[0]);
    Element padded[W];
    store(padded, value);
    std::memcpy(x, padded, count * sizeof(Element));
}

#if FUSEDLOSS_VECTOR_BYTES == 64
inline FloatVector load_first(const float* x, int64_t count) {
    return (FloatVector)_mm512_maskz_loadu_ps(__mmask16((1ull << count) - 1), x);
}
inline Vector<double> load_first(const double* x, int64_t count) {
    return (Vector<double>)_mm512_maskz_loadu_pd(__mmask8((1ull << count) - 1), x);
}
inline void store_first(float* x, FloatVector value, int64_t count) {
    _mm512_mask_storeu_ps(x, __mmask16((1ull << count) - 1), (__m512)value);
}
inline void store_first(double* x, Vector<double> value, int64_t count) {
    _mm512_mask_storeu_pd(x, __mmask8((1ull << count) - 1), (__m512d)value);
}
#elif FUSEDLOSS_VECTOR_BYTES == 32
inline FloatVector load_first(const float* x, int64_t count) {
    return (FloatVector)_mm256_maskload_ps(x, (__m256i)(lane_index<float>() < int32_t(count)));
}
inline Vector<double> load_first(const double* x, int64_t count) {
    return (Vector<double>)_mm256_maskload_pd(x, (__m256i)(lane_index<double>() < count));
}
inline void store_first(float* x, FloatVector value, int64_t count) {
    _mm256_maskstore_ps(x, (__m256i)(lane_index<float>() < int32_t(count)), (__m256)value);
}
inline void store_first(double* x, Vector<double> value, int64_t count) {
    _mm256_maskstore_pd(x, (__m256i)(lane_index<double>() < count), (__m256d)value);
}
#endif

template <class T, class Element>
inline Vector<T> load_partial(const Element* x, int64_t count, T fill) {
    return first_lanes<T>(load_first(x, count), count, fill);
}

template <class T, class Element>
inline void store_partial(Element* x, Vector<T> value, int64_t count) {
    store_first(x, value, count);
}

inline float read_one(const float* x) { return *x; }
inline double read_one(const double* x) { return *x; }
inline float read_one(const BFloat16* x) { return load_partial<float>(x, 1, 0.0f)[0]; }
inline float read_one(const Float16* x) { return load_partial<float>(x, 1, 0.0f)[0]; }

inline void write_one(float* x, float value) { *x = value; }
inline void write_one(double* x, double value) { *x = value; }
inline void write_one(BFloat16* x, float value) { store_partial<float>(x, FloatVector{} + value, 1); }
inline void write_one(Float16* x, float value) { store_partial<float>(x, FloatVector{} + value, 1); }

// Strided elements as contiguous T.
template <class T, class Element>
inline void gather(const Element* x, int64_t stride, int64_t count, T* out) {
    int64_t j = 0;
    if (stride == 1)
        for (; j + Lanes<T>::count <= count; j += Lanes<T>::count) store(out + j, load(x + j));
    for (; j < count; ++j) out[j] = read_one(x + j * stride);
}

// a where a > b, else b: NaN in b stays, NaN in a goes.
template <class V>
inline V larger(V a, V b) {
    return a > b ? a : b;
}

// The processor's maximum is just that, in one instruction where the compiler makes two.
#if FUSEDLOSS_VECTOR_BYTES == 64
inline FloatVector larger(FloatVector a, FloatVector b) {
    return (FloatVector)_mm512_maskz_max_ps(__mmask16(-1), (__m512)a, (__m512)b);
}
inline Vector<double> larger(Vector<double> a, Vector<double> b) {
    return (Vector<double>)_mm512_maskz_max_pd(__mmask8(-1), (__m512d)a, (__m512d)b);
}
#elif FUSEDLOSS_VECTOR_BYTES == 32
inline FloatVector larger(FloatVector a, FloatVector b) { return (FloatVector)_mm256_max_ps((__m256)a, (__m256)b); }
inline Vector<double> larger(Vector<double> a, Vector<double> b) {
    return (Vector<double>)_mm256_max_pd((__m256d)a, (__m256d)b);
}
#endif

template <class T, int count>
struct PackOf {
    typedef T Type __attribute__((vector_size(count * sizeof(T))));
};

template <class T, int count>
using Pack = typename PackOf<T, count>::Type;

// By halves: short dependency chains, and few roundings.
template <class T, int count>
inline T largest_of(Pack<T, count> value) {
    if constexpr (count == 2) {
        return value[0] > value[1] ? value[0] : value[1];
    } else {
        Pack<T, count / 2> halves[2];
        std::memcpy(halves, &value, sizeof value);
        return largest_of<T, count / 2>(larger(halves[0], halves[1]));
    }
}

template <class T, int count>
inline T sum_of(Pack<T, count> value) {
    if constexpr (count == 2) {
        return value[0] + value[1];
    } else {
        Pack<T, count / 2> halves[2];
        std::memcpy(halves, &value, sizeof value);
        return sum_of<T, count / 2>(halves[0] + halves[1]);
    }
}

template <class T>
inline T largest_lane(Vector<T> value) {
    return largest_of<T, Lanes<T>::count>(value);
}

template <class T>
inline double sum_lanes(Vector<T> value) {
    return sum_of<double, Lanes<T>::count>(__builtin_convertvector(value, Pack<double, Lanes<T>::count>));
}

// sum += value and sum += a * b, in double.
template <class T>
inline void add_widened(double* sum, Vector<T> value) {
    constexpr int W = Lanes<T>::count;
    typedef Pack<double, W> Wide;
    Wide total;
    std::memcpy(&total, sum, sizeof total);
    total += __builtin_convertvector(value, Wide);
    std::memcpy(sum, &total, sizeof total);
}

template <class T>
inline void add_product(double* sum, Vector<T> a, Vector<T> b) {
    constexpr int W = Lanes<T>::count;
    typedef Pack<double, W> Wide;
    Wide total;
    std::memcpy(&total, sum, sizeof total);
    total += __builtin_convertvector(a, Wide) * __builtin_convertvector(b, Wide);
    std::memcpy(sum, &total, sizeof total);
}

// Added in double, in two sums so that an addition need not wait for the one before it.
template <class Element, class Other>
double dot(const Element* a, const Other* b, int64_t count) {
    typedef std::conditional_t<std::is_same_v<Element, double>, double, float> T;
    constexpr int W = Lanes<T>::count;
    typedef Pack<double, W> Wide;
    Wide sums[2] = {};
    const auto add = [](Wide& sum, Vector<T> x, Vector<T> y) {
        sum += __builtin_convertvector(x, Wide) * __builtin_convertvector(y, Wide);
    };
    int64_t j = 0;
    for (; j + 2 * W <= count; j += 2 * W) {
        add(sums[0], load(a + j), load(b + j));
        add(sums[1], load(a + j + W), load(b + j + W));
    }
    if (j + W <= count) {
        add(sums[0], load(a + j), load(b + j));
        j += W;
    }
    if (j < count) add(sums[1], load_first(a + j, count - j), load_first(b + j, count - j));
    return sum_of<double, W>(sums[0] + sums[1]);
}

// exp(x) for x <= 0, to about one unit in the last place; 0 below the normal range, NaN where x is NaN.
// x = n ln 2 + r; adding 1.5 * 2^23 + 127 leaves n + 127 in the low bits, which are the exponent of 2^n.
inline FloatVector exp_nonpositive(FloatVector x) {
    constexpr float kShift = 12582912.0f + 127.0f;
    // From here on 2^n is the bit pattern 0; NaN, being no smaller, stays.
    x = larger(FloatVector{} - 88.0f, x);
    const FloatVector shifted = x * 1.44269504088896341f + kShift;
    const FloatVector n = shifted - kShift;
#if FUSEDLOSS_FUSED_MULTIPLY_ADD
    const FloatVector r = x - n * 0.693147180559945309f;
#else
    const FloatVector r = x - n * 0.693145751953125f - n * 1.42860682030941723212e-6f;
#endif
    FloatVector p = r * 0x1.6ab96ep-10f + 0x1.126d1ep-7f;
    p = p * r + 0x1.55589ap-5f;
    p = p * r + 0x1.55540ap-3f;
    p = p * r + 0x1.fffffap-2f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * widen(bits_of(shifted) << 23);
}

inline Vector<double> exp_nonpositive(Vector<double> x) {
    typedef Vector<double> V;
    constexpr double kShift = 6755399441055744.0 + 1023.0;
    const V shifted = x * 1.4426950408889634074 + kShift;
    const V n = shifted - kShift;
    V r = x - n * 6.93147180369123816490e-01;
    r = r - n * 1.90821492927058770002e-10;
    V p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    Lanes<double>::Bits exponent;
    std::memcpy(&exponent, &shifted, sizeof exponent);
    exponent = exponent << 52;
    V power;
    std::memcpy(&power, &exponent, sizeof power);
    return x < -708.0 ? V{} : p * power;
}

// tanh(x) to a few units in the last place: an odd polynomial near 0, (1 - u) / (1 + u) with u = exp(-2|x|) beyond.
inline FloatVector tanh_of(FloatVector x) {
    const FloatVector magnitude = x < 0.0f ? -x : x;
    const FloatVector u = exp_nonpositive(magnitude * -2.0f);
    const FloatVector far = (1.0f - u) / (1.0f + u);
    const FloatVector square = x * x;
    FloatVector p = square * -0x1.94e63ap-8f + 0x1.5829b4p-6f;
    p = p * square - 0x1.b9084ap-5f;
    p = p * square + 0x1.110c6ap-3f;
    p = p * square - 0x1.555548p-2f;
    const FloatVector near = x + x * square * p;
    return magnitude < 0.55f ? near : (x < 0.0f ? -far : far);
}

inline Vector<double> tanh_of(Vector<double> x) {
    for (int lane = 0; lane < Lanes<double>::count; ++lane) x[lane] = std::tanh(x[lane]);
    return x;
}
