// The vocabulary of a rule over arrays.
#include "cpu/kernels/blocks.h"
#include "cpu/kernels/kernels.h"

#include <algorithm>
#include <cstring>

OPTIM8_BEGIN

void number_blocks(const NumberJob& job, int64_t begin, int64_t end) {
    const int64_t stop = std::min(end * step_block, job.size);
    for (int64_t at = begin * step_block; at < stop; at += group) {
        const int64_t n = std::min<int64_t>(group, stop - at);
        const Padded<float> a(job.a + at, n), b(job.b + at, n), c(job.c + at, n);
        float out[group];
        for (int j = 0; j < group; j += width)
            store(out + j, apply(job.operation, load(a.values + j), load(b.values + j), load(c.values + j)));
        std::memcpy(job.out + at, out, static_cast<size_t>(n) * sizeof(float));
    }
}

OPTIM8_END
