// Work split over threads: items are handed out in chunks, in order, to whoever is free. What an item computes does
// not depend on who computes it, so results are the same for any number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace optim8 {

// Default floating-point environment for the time of a call: torch.set_flush_denormal sets a flag of the calling
// thread alone, which would make results depend on which thread computes them.
class DefaultRounding {
  public:
#if defined(__x86_64__)
    DefaultRounding() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
    ~DefaultRounding() { _mm_setcsr(saved_); }

  private:
    unsigned saved_;
#else
    DefaultRounding() {}
#endif
};

// Items to hand out at a time: `most`, or less where that would leave threads without work. Chunks of some 256 Ki
// values are best: smaller ones start the hardware's prefetching over too often, and with one run for each thread the
// threads work on far apart pages of memory.
inline int64_t chunk_size(int64_t items, int threads, int64_t most) {
    return std::max<int64_t>(1, std::min(most, items / (8 * std::max(threads, 1))));
}

struct Nothing {
    void operator()() const {}
};

// work(begin, end) over all of [0, items). The calling thread first does `meanwhile`, once and whatever the items are,
// while the others work already.
template <class Work, class Meanwhile = Nothing>
void parallel_for(int64_t items, int64_t chunk, int threads, const Work& work, const Meanwhile& meanwhile = {}) {
    const int64_t chunks = (items + chunk - 1) / chunk;
    if (threads <= 1 || chunks <= 1) {
        meanwhile();
        const DefaultRounding rounding;
        if (items > 0) work(int64_t{0}, items);
        return;
    }
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(static_cast<int>(std::min<int64_t>(threads, chunks)))
    {
#pragma omp master
        meanwhile();
        const DefaultRounding rounding;
        for (int64_t c = next++; c < chunks; c = next++) work(c * chunk, std::min(items, (c + 1) * chunk));
    }
}

}  // namespace optim8
