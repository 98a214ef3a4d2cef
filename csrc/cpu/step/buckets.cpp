#include "cpu/step/buckets.h"

#include "core/norms.h"

#include <algorithm>
#include <utility>

namespace optim8 {
namespace {

template <class T>
T* moved(T* address, int64_t bytes) {
    return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(address) + static_cast<uintptr_t>(bytes));
}

// Blocks [begin, end) of a row, as a row.
Row part_of(const Row& row, int64_t begin, int64_t end) {
    const int64_t skipped = begin * step_block;
    Row part = row;
    part.param = moved(row.param, skipped * bytes_of(row.param_storage));
    part.grad = moved(row.grad, skipped * bytes_of(row.grad_storage));
    part.size = std::min(end * step_block, row.size) - skipped;
    part.first_block = row.first_block + static_cast<uint32_t>(begin);
    for (int s = 0; s < max_states; ++s) {
        if (row.state[s] != nullptr) part.state[s] = moved(row.state[s], skipped * bytes_of(row.precision));
        if (row.low[s] != nullptr) part.low[s] = row.low[s] + skipped;
        if (row.absmax[s] != nullptr) part.absmax[s] = row.absmax[s] + begin;
    }
    if (row.of_blocks != nullptr) part.of_blocks = row.of_blocks + norms * begin;
    return part;
}

// The memory of a row's state that lies in `paged`. Nothing else may ever become a span: releasing it would lose it.
std::vector<Span> spans_of(const Row& row, const std::vector<Span>& paged) {
    std::vector<Span> found;
    for_each_part(row, [&](const void* address, int64_t bytes) {
        const uintptr_t begin = reinterpret_cast<uintptr_t>(address), end = begin + static_cast<uintptr_t>(bytes);
        const auto holds = [&](const Span& s) { return s.first <= begin && end <= s.second; };
        if (std::any_of(paged.begin(), paged.end(), holds))
            found.emplace_back(begin & ~(page - 1), (end + page - 1) & ~(page - 1));
    });
    return found;
}

int64_t bytes_of_block(const Row& row) {
    Row block = row;
    block.size = step_block;
    int64_t bytes = 0;
    for_each_part(block, [&](const void*, int64_t of_part) { bytes += of_part; });
    return bytes;
}

void merge(std::vector<Span>& spans) {
    std::sort(spans.begin(), spans.end());
    size_t last = 0;
    for (size_t i = 1; i < spans.size(); ++i) {
        if (spans[i].first <= spans[last].second)
            spans[last].second = std::max(spans[last].second, spans[i].second);
        else
            spans[++last] = spans[i];
    }
    if (!spans.empty()) spans.resize(last + 1);
}

}  // namespace

Buckets cut_buckets(const std::vector<Row>& rows, const std::vector<Span>& paged, int64_t bytes) {
    Buckets buckets;
    Bucket resident, filling;
    const auto flush = [&] {
        if (filling.rows.empty()) return;
        merge(filling.spans);
        buckets.push_back(std::move(filling));
        filling = Bucket{};
    };
    for (const Row& row : rows) {
        if (row.size == 0) continue;
        if (spans_of(row, paged).empty()) {
            resident.rows.push_back(row);
            continue;
        }
        const int64_t of_block = bytes_of_block(row), blocks = blocks_of(row.size, step_block);
        for (int64_t begin = 0; begin < blocks;) {
            if (filling.bytes + of_block > bytes) flush();
            const int64_t end = std::min(blocks, begin + std::max<int64_t>(1, (bytes - filling.bytes) / of_block));
            filling.rows.push_back(part_of(row, begin, end));
            for (const Span& span : spans_of(filling.rows.back(), paged)) filling.spans.push_back(span);
            filling.bytes += (end - begin) * of_block;
            begin = end;
        }
    }
    flush();
    if (!resident.rows.empty()) buckets.insert(buckets.begin(), std::move(resident));
    return buckets;
}

}  // namespace optim8
