// Rows cut into buckets: runs of blocks whose paged state is of at most a given size, so that a step can stream state
// that does not all fit. Blocks are independent, so a step in buckets gives the bits of a step in one.
#pragma once

#include "bind/step_table.h"

#include <cstdint>
#include <utility>
#include <vector>

namespace optim8 {

struct Bucket {
    std::vector<Row> rows;    // whole tensors, or runs of blocks of large ones
    std::vector<Span> spans;  // the paged memory that the rows use, in whole pages, sorted and apart from each other
    int64_t bytes = 0;        // of paged state
};

using Buckets = std::vector<Bucket>;

// Every row is in one bucket or spread over consecutive ones. Rows without state in `paged` make up the first bucket,
// which has no spans. A bucket holds at least one block, however small `bytes` is.
Buckets cut_buckets(const std::vector<Row>& rows, const std::vector<Span>& paged, int64_t bytes);

}  // namespace optim8
