#include "cpu/step/rows.h"

#include "core/codec.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"

#include <algorithm>

namespace optim8 {

void step_rows(const std::vector<Row>& rows, int threads, const std::function<void()>& meanwhile) {
    // Work is split by blocks, not by tensors: chunk c covers the same run of blocks whatever tensors they are of.
    std::vector<int64_t> first(rows.size() + 1, 0);
    for (size_t r = 0; r < rows.size(); ++r) first[r + 1] = first[r] + blocks_of(rows[r].size, step_block);
    const Kernels& use = kernels();
    parallel_for(
        first.back(), chunk_size(first.back(), threads, 1024), threads,
        [&](int64_t begin, int64_t end) {
            size_t r = static_cast<size_t>(std::upper_bound(first.begin(), first.end(), begin) - first.begin()) - 1;
            for (; begin < end; ++r) {
                const int64_t stop = std::min(end, first[r + 1]);
                if (stop > begin) use.step_blocks(rows[r], begin - first[r], stop - first[r]);
                begin = std::max(begin, stop);
            }
        },
        meanwhile);
}

void step_rows_here(const std::vector<Row>& rows) {
    const DefaultRounding rounding;
    for (const Row& row : rows) kernels().step_blocks(row, 0, blocks_of(row.size, step_block));
}

}  // namespace optim8
