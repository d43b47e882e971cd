// Ranges of work over OpenMP threads: contiguous, fixed for a given thread count, so that reruns give the same bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fusedloss {

inline bool has_openmp() {
#ifdef _OPENMP
    return true;
#else
    return false;
#endif
}

// Threads worth starting for `work` elements: waking one costs a few microseconds, the time of about this many.
inline int useful_threads(int64_t work, int64_t ranges, int threads) {
    constexpr int64_t kWorkPerThread = 16384;
    const int64_t useful = std::min<int64_t>({threads, ranges, work / kWorkPerThread});
    return has_openmp() && useful > 1 ? static_cast<int>(useful) : 1;
}

// Calls body(first, last, thread) with the share of [0, count) that belongs to each thread.
template <class Body>
void parallel_ranges(int64_t count, int threads, const Body& body) {
    if (threads <= 1) {
        body(int64_t(0), count, 0);
        return;
    }
    std::exception_ptr error;
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        const int thread = omp_get_thread_num(), team = omp_get_num_threads();
#else
        const int thread = 0, team = 1;
#endif
        try {
            body(count * thread / team, count * (thread + 1) / team, thread);
        } catch (...) {
#pragma omp critical
            error = std::current_exception();
        }
    }
    if (error) std::rethrow_exception(error);
}

}  // namespace fusedloss
