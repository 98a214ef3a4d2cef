// A step over state that is in files, past the page cache.
#pragma once

#include "bind/buckets.h"

#include <vector>

namespace optim8 {

class DirectMemory;  // cpu/direct_io.h

// A file that is mapped from its first byte on.
struct PagedFile {
    Span span;
    int handle;  // open with O_DIRECT
};

struct DiskError {
    int number;  // errno
    bool writing;
};

// Steps all buckets: each is read into `memory`, stepped there and written back, several at a time and with no more
// than `threads` that step. Gives false, and has done nothing, where that cannot be: `memory` is too small for two
// buckets, or there is no room for a thread. Throws DiskError; what was stepped until then stays stepped.
bool step_past_cache(const Buckets& buckets, const std::vector<PagedFile>& files, const DirectMemory& memory,
                     int threads);

}  // namespace optim8
