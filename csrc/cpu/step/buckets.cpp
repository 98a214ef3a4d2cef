#include "cpu/step/buckets.h"

#include "cpu/step/rows.h"

#include <algorithm>
#include <utility>

namespace optim8 {
namespace {

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
