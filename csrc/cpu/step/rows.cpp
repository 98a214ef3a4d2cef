#include "cpu/step/rows.h"

#include "core/codec.h"
#include "core/rule_table.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"

#include <algorithm>

namespace optim8 {
namespace {

template <class T>
T* moved(T* address, int64_t bytes) {
    return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(address) + static_cast<uintptr_t>(bytes));
}

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
    if (row.param_low != nullptr) of_value += optim8::bytes_of(row.weight);
    return row.size * of_value;
}

// Rows of rules with norms. So many at a time are measured and then stepped that the caches still hold of them what
// they can; the last that was measured is stepped first.
void measure_and_step(std::vector<Row> rows, int threads, const std::function<void()>& meanwhile) {
    constexpr int64_t bytes_at_a_time = int64_t{8} << 20;
    std::vector<size_t> begins;
    int64_t bytes = 0;
    for (size_t r = 0; r < rows.size(); ++r) {
        if (begins.empty() || bytes + bytes_of(rows[r]) > bytes_at_a_time) {
            begins.push_back(r);
            bytes = 0;
        }
        bytes += bytes_of(rows[r]);
    }
    begins.push_back(rows.size());
    std::vector<double> sums(norms * rows.size());
    for (size_t r = 0; r < rows.size(); ++r) rows[r].sums = sums.data() + norms * r;
    Measurement measurement(threads);
    for (size_t i = 0; i + 1 < begins.size(); ++i) {
        const Row* first = rows.data() + begins[i];
        const size_t count = begins[i + 1] - begins[i];
        measurement.add(first, count, i == 0 ? meanwhile : [] {});
        measurement.end();
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

Row part_of(const Row& row, int64_t begin, int64_t end) {
    const int64_t skipped = begin * step_block;
    Row part = row;
    part.param = moved(row.param, skipped * bytes_of(row.param_storage));
    part.grad = moved(row.grad, skipped * bytes_of(row.grad_storage));
    part.size = std::min(end * step_block, row.size) - skipped;
    if (row.param_low != nullptr) part.param_low = moved(row.param_low, skipped * optim8::bytes_of(row.weight));
    part.first_block = row.first_block + static_cast<uint32_t>(begin);
    for (int s = 0; s < max_states; ++s) {
        if (row.state[s] != nullptr) part.state[s] = moved(row.state[s], skipped * bytes_of(row.precision));
        if (row.low[s] != nullptr) part.low[s] = row.low[s] + skipped;
        if (row.absmax[s] != nullptr) part.absmax[s] = row.absmax[s] + begin;
    }
    return part;
}

Measurement::Measurement(int threads)
    : threads_(threads), of_blocks_(static_cast<size_t>(norms * blocks_at_a_time * threads)) {
    parts_.reserve(static_cast<size_t>(parts_at_a_time * threads));
}

void Measurement::add(const Row* rows, size_t count, const std::function<void()>& meanwhile) {
    bool first = true;
    const auto measure = [&] {
        over_blocks(kernels().measure_blocks, parts_.data(), parts_.size(), threads_, false, first ? meanwhile : [] {});
        first = false;
        for (const Row& part : parts_) {
            if (part.sums != sums_) end();
            sums_ = part.sums;
            of_tensor_.add(part.of_blocks, blocks_of(part.size, step_block));
        }
        parts_.clear();
    };
    int64_t room = blocks_at_a_time * threads_;
    for (size_t r = 0; r < count; ++r) {
        const int64_t blocks = blocks_of(rows[r].size, step_block);
        for (int64_t begin = 0; begin < blocks;) {
            if (room == 0 || parts_.size() == parts_.capacity()) {
                measure();
                room = blocks_at_a_time * threads_;
            }
            const int64_t end = std::min(blocks, begin + room);
            Row part = part_of(rows[r], begin, end);
            part.of_blocks = of_blocks_.data() + of_blocks_.size() - norms * room;
            parts_.push_back(part);
            room -= end - begin;
            begin = end;
        }
    }
    measure();
}

void Measurement::end() {
    if (sums_ != nullptr) of_tensor_.put(sums_);
    sums_ = nullptr;
    of_tensor_ = BlockSums();
}

}  // namespace optim8
