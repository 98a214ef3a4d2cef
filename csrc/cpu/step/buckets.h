// Rows cut into buckets: runs of blocks whose paged state is of at most a given size, so that a step can stream state
// that does not all fit. Blocks are independent, so a step in buckets gives the bits of a step in one.
#pragma once

#include "core/codec.h"
#include "core/row.h"
#include "core/span.h"

#include <cstdint>
#include <vector>

namespace optim8 {

constexpr uintptr_t page = 4096;

struct Bucket {
    std::vector<Row> rows;    // whole tensors, or runs of blocks of large ones
    std::vector<Span> spans;  // the paged memory that the rows use, in whole pages, sorted and apart from each other
    int64_t bytes = 0;        // of paged state
};

using Buckets = std::vector<Bucket>;

// Calls visit(address, bytes) for each array of a row's state.
template <class Visit>
void for_each_part(const Row& row, const Visit& visit) {
    for (int s = 0; s < max_states; ++s) {
        if (row.state[s] != nullptr) visit(row.state[s], row.size * bytes_of(row.precision));
        if (row.low[s] != nullptr) visit(row.low[s], row.size);
        if (row.absmax[s] != nullptr) visit(row.absmax[s], 4 * blocks_of(row.size, step_block));
    }
    if (row.param_low != nullptr) visit(row.param_low, row.size * bytes_of(row.weight));
}

// Every row is in one bucket or spread over consecutive ones. Rows without state in `paged` make up the first bucket,
// which has no spans. A bucket holds at least one block, however small `bytes` is.
Buckets cut_buckets(const std::vector<Row>& rows, const std::vector<Span>& paged, int64_t bytes);

}  // namespace optim8
