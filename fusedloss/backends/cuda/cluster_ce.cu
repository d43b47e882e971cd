// Softmax cross-entropy of rows too long for one multiprocessor, with one read of the logits: the blocks of a cluster
// own slices of the classes, rows stream through shared memory, and one exchange of (maximum, sum) makes a row's sums.
//
// Compiled by NVRTC with ELEMENT (0 float32, 1 bfloat16, 2 float16), WARPS, VECTORS (of 16 bytes, of a thread), STAGES,
// CLUSTER, SCALE, BIAS and ALIGNED; in tests as C++ with EMULATION, a header with the same primitives. Exponents are in
// units of log 2, where exp is one instruction: z = x * scale + bias there, and without these two x itself until the
// exponent is formed, whose rounding then does not grow with x.
//
// Rows must be contiguous. If ALIGNED they are multiples of 16 bytes apart and long, and begin at such a multiple, in
// logits and gradient. If not, both begin equally far from one; what lies before the first multiple and after the last
// is read and written by the threads whose vectors these are, since memory is copied in units of 16 bytes.

struct Arguments {
    const void* logits;
    const long long* labels;
    const float *scale, *bias, *class_weight;  // (classes,); null where there is none
    const float* denominator;                  // of the mean; null for a sum
    void* grad;
    float* row_loss;
    long long rows, row_step, grad_step, ignore_index;
    int classes, slice;  // of a block: a multiple of 64
    float factor;        // of the gradient
};

#ifdef EMULATION
#include EMULATION
#else
#define KERNEL extern "C" __global__ void __launch_bounds__(32 * WARPS, 1)
#define INLINE __device__ __forceinline__
struct alignas(16) Words {
    unsigned word[4];
};
extern __shared__ __align__(128) char shared_bytes[];
INLINE char* shared_memory() { return shared_bytes; }
INLINE int thread_index() { return threadIdx.x; }
INLINE int block_index() { return blockIdx.x; }
INLINE int num_blocks() { return gridDim.x; }
INLINE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
INLINE float as_float(unsigned bits) { return __uint_as_float(bits); }
INLINE unsigned as_bits(float value) { return __float_as_uint(value); }
INLINE unsigned two_bfloat16(float low, float high) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
INLINE unsigned two_float16(float low, float high) {
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
INLINE float of_float16(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
INLINE float exchange(float value, int offset) { return __shfl_xor_sync(~0u, value, offset); }
INLINE unsigned address(const void* pointer) { return (unsigned)__cvta_generic_to_shared(pointer); }
INLINE void block_sync() { __syncthreads(); }
INLINE void cluster_sync() {
    // Not .aligned: threads of a warp may come apart before it.
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
INLINE int cluster_rank() {
    unsigned rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
INLINE void store_remote(float* place, int rank, float value) {
    unsigned remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address(place)), "r"(rank));
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(value) : "memory");
}
INLINE void barrier_init(unsigned long long* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(address(barrier))
                 : "memory");
}
INLINE void barrier_wait(unsigned long long* barrier, int phase) {
    unsigned done;
    do {
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(address(barrier)), "r"(phase)
                     : "memory");
    } while (!done);
}
INLINE void copy_in(void* to, const void* from, unsigned bytes, unsigned long long* barrier) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)), "r"(bytes)
                 : "memory");
    if (bytes == 0) return;
    // What is read once leaves the cache first.
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
            "r"(address(to)),
        "l"(from), "r"(bytes), "r"(address(barrier)), "l"(0x12F0000000000000ull)
        : "memory");
}
INLINE void show_to_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
INLINE void copy_out(void* to, const void* from, unsigned bytes) {
    if (bytes)
        asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(address(from)),
                     "r"(bytes)
                     : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
INLINE void wait_for_copies_but_one() { asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory"); }
INLINE void wait_for_copies() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
#endif

#if ELEMENT == 0
typedef float Element;
#else
typedef unsigned short Element;
#endif
constexpr int THREADS = 32 * WARPS, LANES = 16 / sizeof(Element);
constexpr int HEADER = 512;             // bytes before the slices
constexpr int ROOM = ALIGNED ? 0 : 64;  // elements of a buffer beyond a slice
constexpr bool PLAIN = !SCALE && !BIAS;
constexpr float LOG2_E = 1.4426950408889634f, LOG_2 = 0.6931471805599453f;
#define INFINITE as_float(0x7f800000u)
static_assert(8 * STAGES <= 64 && 64 + 16 * (WARPS + CLUSTER) <= HEADER, "the header holds barriers and sums");
static_assert((WARPS & (WARPS - 1)) == 0 && (CLUSTER & (CLUSTER - 1)) == 0 && WARPS <= 32, "powers of two");

INLINE float widened(Element value) {
#if ELEMENT == 0
    return value;
#elif ELEMENT == 1
    return as_float((unsigned)value << 16);
#else
    return of_float16(value);
#endif
}

INLINE Element narrowed(float value) {
#if ELEMENT == 0
    return value;
#elif ELEMENT == 1
    return (Element)two_bfloat16(value, 0.f);
#else
    return (Element)two_float16(value, 0.f);
#endif
}

INLINE void unpack(const Words& words, float* values) {
    for (int i = 0; i < 4; ++i) {
#if ELEMENT == 0
        values[i] = as_float(words.word[i]);
#elif ELEMENT == 1
        values[2 * i] = as_float(words.word[i] << 16);
        values[2 * i + 1] = as_float(words.word[i] & 0xffff0000u);
#else
        values[2 * i] = of_float16((unsigned short)words.word[i]);
        values[2 * i + 1] = of_float16((unsigned short)(words.word[i] >> 16));
#endif
    }
}

INLINE Words pack(const float* values) {
    Words words;
    for (int i = 0; i < 4; ++i) {
#if ELEMENT == 0
        words.word[i] = as_bits(values[i]);
#elif ELEMENT == 1
        words.word[i] = two_bfloat16(values[2 * i], values[2 * i + 1]);
#else
        words.word[i] = two_float16(values[2 * i], values[2 * i + 1]);
#endif
    }
    return words;
}

// Where a class's number lies in shared memory: in order if vectors begin at multiples of LANES, else every LANES-th in
// a run, so that the threads of a warp read from different banks.
INLINE int place_of(int c, int slice) { return ALIGNED ? c : c % LANES * (slice / LANES) + c / LANES; }

// The numbers of the classes of a vector, the first of them `offset` before a multiple of LANES; others where one does
// not exist.
INLINE void read_numbers(const float* from, int vector, int offset, int slice, float* numbers) {
    if (ALIGNED) {
#pragma unroll
        for (int i = 0; i < LANES; i += 4) {
            const Words four = *(const Words*)(from + vector * LANES + i);
#pragma unroll
            for (int j = 0; j < 4; ++j) numbers[i + j] = as_float(four.word[j]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < LANES; ++i) {
            // place_of(vector * LANES - offset + i)
            const int before = i < offset;
            numbers[i] = from[vector + (i - offset + before * LANES) * (slice / LANES) - before];
        }
    }
}

// What a block has of a row: elements from `offset` on of its buffer, `head` of them before whole vectors.
struct Part {
    int offset, head;
    unsigned bytes;  // of whole vectors
};

INLINE Part part_of(const Arguments& a, long long row, int first, int count) {
    if (ALIGNED) return {0, 0, (unsigned)(count * sizeof(Element))};
    const unsigned long long begin = (unsigned long long)((const Element*)a.logits + row * a.row_step + first);
    const int offset = (int)(begin / sizeof(Element) % LANES), before = (LANES - offset) % LANES;
    const int head = before < count ? before : count;
    return {offset, head, (unsigned)((count - head) / LANES * LANES * sizeof(Element))};
}

INLINE void fetch(const Arguments& a, long long row, int first, int count, Element* buffer, unsigned long long* full) {
    const Part part = part_of(a, row, first, count);
    const Element* from = (const Element*)a.logits + row * a.row_step + first + part.head;
    copy_in(buffer + part.offset + part.head, from, part.bytes, full);
}

// The sum of 2^z, over the values behind several threads, as 2^top * sum.
struct Sums {
    float top, sum;
};

// z, or x where there are no terms, in units of log 2 and less `top`, which is in them.
INLINE float exponent(float z, float top) { return PLAIN ? fmaf(z, LOG2_E, -top) : z - top; }

// Of -inf the finite 0, so that differences to it are no NaN.
INLINE float finite(float top) { return top == -INFINITE ? 0.f : top; }

INLINE Sums over_lanes(Sums own, int lanes) {
    float top = own.top;
    for (int offset = lanes / 2; offset; offset /= 2) top = fmaxf(top, exchange(top, offset));
    float sum = own.sum * exp2_approx(own.top - finite(top));
    for (int offset = lanes / 2; offset; offset /= 2) sum += exchange(sum, offset);
    return {top, sum};
}

KERNEL cluster_ce(const Arguments a) {
    char* memory = shared_memory();
    unsigned long long* full = (unsigned long long*)memory;
    Sums* of_warps = (Sums*)(memory + 64);  // two sets, for rows in turn
    Sums* of_blocks = of_warps + 2 * WARPS;
    float* scale = (float*)(memory + HEADER);
    float* bias = scale + (SCALE ? a.slice : 0);
    Element* buffers = (Element*)(bias + (BIAS ? a.slice : 0));
    const int thread = thread_index(), warp = thread / 32, lane = thread % 32, rank = cluster_rank();
    const int first = rank * a.slice, left = a.classes - first;
    const int count = left < 0 ? 0 : left < a.slice ? left : a.slice;
    const int room = a.slice + ROOM;
    const long long clusters = num_blocks() / CLUSTER;
    const Element* logits = (const Element*)a.logits;
    Element* grad = (Element*)a.grad;

    if (thread == 0)
        for (int stage = 0; stage < STAGES; ++stage) barrier_init(full + stage);
    for (int c = thread; c < count; c += THREADS) {
        if (SCALE) scale[place_of(c, a.slice)] = a.scale[first + c] * LOG2_E;
        if (BIAS) bias[place_of(c, a.slice)] = a.bias[first + c] * LOG2_E;
    }
    block_sync();
    cluster_sync();
    long long row = block_index() / CLUSTER;
    if (thread == 0)
        for (int stage = 0; stage < STAGES - 1; ++stage) {
            const long long ahead = row + stage * clusters;
            if (ahead < a.rows) fetch(a, ahead, first, count, buffers + stage * room, full + stage);
        }
    const float per_row = a.factor / (a.denominator ? *a.denominator : 1.f);
    int stage = 0, phase = 0, turn = 0;
    for (; row < a.rows; row += clusters, turn ^= 1) {
        Element* buffer = buffers + stage * room;
        const Part part = part_of(a, row, first, count);
        const Element* own_logits = logits + row * a.row_step + first;
        Element* own_grad = grad + row * a.grad_step + first;
        const int whole = part.head + part.bytes / sizeof(Element);
        const long long label = a.labels[row];
        const bool kept = label != a.ignore_index, valid = kept && label >= 0 && label < a.classes;
        // The label is left out of the sums and comes from memory, so that 1 - p keeps its digits.
        const int mine = valid && label >= first && label < first + count ? (int)(label - first) : -1;
        float weight = 1.f, label_scale = LOG2_E, label_logit = as_float(0x7fc00000u);
        if (valid) {
            label_logit = widened(logits[row * a.row_step + label]);
            if (SCALE) label_scale *= a.scale[label];
            if (!PLAIN) label_logit *= label_scale;
            if (BIAS) label_logit += a.bias[label] * LOG2_E;
            if (a.class_weight) weight = a.class_weight[label];
        }
        barrier_wait(full + stage, phase);

        float value[VECTORS][LANES], top = -INFINITE;
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            const int vector = v * THREADS + thread, c = vector * LANES - part.offset;
            if (c < count) {
                const bool edge = !ALIGNED && (c < part.head || c >= whole);
                if (!edge) unpack(*(const Words*)(buffer + part.offset + c), value[v]);
                else
#pragma unroll
                    for (int i = 0; i < LANES; ++i)
                        value[v][i] = c + i >= 0 && c + i < count ? widened(own_logits[c + i]) : -INFINITE;
                float scales[LANES], biases[LANES];
                if (SCALE) read_numbers(scale, vector, part.offset, a.slice, scales);
                if (BIAS) read_numbers(bias, vector, part.offset, a.slice, biases);
#pragma unroll
                for (int i = 0; i < LANES; ++i) {
                    if (!PLAIN) value[v][i] *= SCALE ? scales[i] : LOG2_E;
                    if (BIAS) value[v][i] += biases[i];
                }
                if (edge) {
#pragma unroll
                    for (int i = 0; i < LANES; ++i)
                        if (c + i < 0 || c + i >= count) value[v][i] = -INFINITE;
                }
                if ((unsigned)(mine - c) < (unsigned)LANES) {
#pragma unroll
                    for (int i = 0; i < LANES; ++i)
                        if (c + i == mine) value[v][i] = -INFINITE;
                }
            } else {
#pragma unroll
                for (int i = 0; i < LANES; ++i) value[v][i] = -INFINITE;
            }
#pragma unroll
            for (int i = 0; i < LANES; ++i) top = fmaxf(top, value[v][i]);
        }
        // A thread's own maximum serves until the row's is known.
        if (PLAIN) top *= LOG2_E;
        const float shift = finite(top);
        float sum = 0.f;
#pragma unroll
        for (int v = 0; v < VECTORS; ++v)
#pragma unroll
            for (int i = 0; i < LANES; ++i) {
                value[v][i] = exp2_approx(exponent(value[v][i], shift));
                sum += value[v][i];
            }
        Sums sums = over_lanes({top, sum}, 32);
        if (lane == 0) of_warps[turn * WARPS + warp] = sums;
        block_sync();
        sums = over_lanes(of_warps[turn * WARPS + lane % WARPS], WARPS);
        if (thread < CLUSTER) {
            Sums* place = of_blocks + turn * CLUSTER + rank;
            store_remote(&place->top, thread, sums.top);
            store_remote(&place->sum, thread, sums.sum);
        }
        cluster_sync();
        sums = over_lanes(of_blocks[turn * CLUSTER + lane % CLUSTER], CLUSTER);

        const float label_top = PLAIN ? label_logit * LOG2_E : label_logit, most = fmaxf(sums.top, label_top);
        const float others = sums.sum * exp2_approx(sums.top - most), below = exponent(label_logit, most);
        const float own = exp2_approx(below);
        const float total = others + own, share = weight * per_row / total;
        if (thread == 0 && rank == 0) {
            const float loss = label_top >= sums.top ? log1pf(others / own) : logf(total) - below * LOG_2;
            a.row_loss[row] = kept ? weight * loss : 0.f;
        }
        const float label_slope = -share * others * (SCALE ? label_scale * LOG_2 : 1.f);
        const float coefficient = share * exp2_approx(top - most) * (SCALE ? LOG_2 : 1.f);
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            const int vector = v * THREADS + thread, c = vector * LANES - part.offset;
            if (c < count) {
                float scales[LANES];
                if (SCALE) read_numbers(scale, vector, part.offset, a.slice, scales);
#pragma unroll
                for (int i = 0; i < LANES; ++i) {
                    const float slope = value[v][i] * coefficient;
                    value[v][i] = SCALE ? slope * scales[i] : slope;
                }
                Words words = pack(value[v]);
                if (!kept) words = {{0, 0, 0, 0}};
                Element* place = buffer + part.offset + c;
                if (ALIGNED || (c >= part.head && c < whole)) {
                    *(Words*)place = words;
                    if ((unsigned)(mine - c) < (unsigned)LANES) place[mine - c] = narrowed(label_slope);
                } else {
#pragma unroll
                    for (int i = 0; i < LANES; ++i) {
                        const float slope = !kept ? 0.f : c + i == mine ? label_slope : value[v][i];
                        if (c + i >= 0 && c + i < count) own_grad[c + i] = narrowed(slope);
                    }
                }
            }
        }
        show_to_copies();
        block_sync();
        if (thread == 0) {
            copy_out(own_grad + part.head, buffer + part.offset + part.head, part.bytes);
            const long long ahead = row + (STAGES - 1) * clusters;
            if (ahead < a.rows) {
                // That buffer's row went out a turn before.
                wait_for_copies_but_one();
                const int next = (stage + STAGES - 1) % STAGES;
                fetch(a, ahead, first, count, buffers + next * room, full + next);
            }
        }
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }
    if (thread == 0) wait_for_copies();
    // No block leaves while another may write to its shared memory.
    cluster_sync();
}
