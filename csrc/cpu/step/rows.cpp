#include "cpu/step/rows.h"

#include "core/codec.h"
#include "core/norms.h"
#include "core/rule_table.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"

#include <algorithm>

namespace optim8 {
namespace {

using Kernel = void (*)(const Row&, int64_t, int64_t);
constexpr int64_t most_blocks = 1024;  // of a thread at a time

// A kernel over all blocks. Work is split by blocks, not by tensors: chunk c covers the same run of blocks whatever
// tensors they are of.
void over_blocks(Kernel kernel, const Row* rows, size_t count, int threads, bool backwards,
                 const std::function<void()>& meanwhile) {
    std::vector<int64_t> first(count + 1, 0);
    for (size_t r = 0; r < count; ++r) first[r + 1] = first[r] + blocks_of(rows[r].size, step_block);
    const int64_t all = first.back();
    parallel_for(
        all, chunk_size(all, threads, most_blocks), threads,
        [&](int64_t from, int64_t to) {
            int64_t begin = backwards ? all - to : from;
            const int64_t end = backwards ? all - from : to;
            size_t r = static_cast<size_t>(std::upper_bound(first.begin(), first.end(), begin) - first.begin()) - 1;
            for (; begin < end; ++r) {
                const int64_t stop = std::min(end, first[r + 1]);
                if (stop > begin) kernel(rows[r], begin - first[r], stop - first[r]);
                begin = std::max(begin, stop);
            }
        },
        meanwhile);
}

int64_t bytes_of(const Row& row) {
    int64_t of_value = optim8::bytes_of(row.param_storage) + optim8::bytes_of(row.grad_storage);
    for (int s = 0; s < max_states; ++s) {
        if (row.state[s] != nullptr) of_value += optim8::bytes_of(row.precision);
        if (row.low[s] != nullptr) of_value += 1;
    }
    return row.size * of_value;
}

// Rows of rules with norms. So many at a time are measured and then stepped that the caches still hold of them what
// they can; the last that was measured is stepped first.
void measure_and_step(std::vector<Row> rows, int threads, const std::function<void()>& meanwhile) {
    constexpr int64_t bytes_at_a_time = int64_t{8} << 20;
    std::vector<size_t> begins;
    int64_t bytes = 0, most = 0, blocks = 0;
    for (size_t r = 0; r < rows.size(); ++r) {
        if (begins.empty() || bytes + bytes_of(rows[r]) > bytes_at_a_time) {
            begins.push_back(r);
            bytes = blocks = 0;
        }
        bytes += bytes_of(rows[r]);
        blocks += blocks_of(rows[r].size, step_block);
        most = std::max(most, blocks);
    }
    begins.push_back(rows.size());
    // The large memory before the first row is stepped: where there is none, nothing is done.
    std::vector<double> sums(norms * rows.size()), of_blocks(static_cast<size_t>(norms * most));
    for (size_t i = 0; i + 1 < begins.size(); ++i) {
        double* at = of_blocks.data();
        for (size_t r = begins[i]; r < begins[i + 1]; ++r) {
            rows[r].sums = sums.data() + norms * r;
            rows[r].of_blocks = at;
            at += norms * blocks_of(rows[r].size, step_block);
        }
        const Row* first = rows.data() + begins[i];
        const size_t count = begins[i + 1] - begins[i];
        over_blocks(kernels().measure_blocks, first, count, threads, false, i == 0 ? meanwhile : [] {});
        for (size_t r = 0; r < count; ++r)
            optim8::sum_blocks(first[r].of_blocks, blocks_of(first[r].size, step_block), first[r].sums);
        over_blocks(kernels().step_blocks, first, count, threads, true, [] {});
    }
}

bool lacks_sums(const Row& row) { return rule_info(row.rule).has_norms && row.sums == nullptr; }

}  // namespace

void step_rows(const std::vector<Row>& rows, int threads, const std::function<void()>& meanwhile) {
    if (std::any_of(rows.begin(), rows.end(), lacks_sums)) return measure_and_step(rows, threads, meanwhile);
    over_blocks(kernels().step_blocks, rows.data(), rows.size(), threads, false, meanwhile);
}

void step_rows_here(const std::vector<Row>& rows) {
    const DefaultRounding rounding;
    for (const Row& row : rows) kernels().step_blocks(row, 0, blocks_of(row.size, step_block));
}

void measure_rows(const std::vector<Row>& rows, int threads, const std::function<void()>& meanwhile) {
    over_blocks(kernels().measure_blocks, rows.data(), rows.size(), threads, false, meanwhile);
}

void sum_rows(const std::vector<Row>& rows, int threads) {
    parallel_for(static_cast<int64_t>(rows.size()), 1, threads, [&](int64_t begin, int64_t end) {
        for (; begin < end; ++begin) {
            const Row& row = rows[static_cast<size_t>(begin)];
            sum_blocks(row.of_blocks, blocks_of(row.size, step_block), row.sums);
        }
    });
}

}  // namespace optim8
