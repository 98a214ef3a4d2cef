// A step over state that is in files, in memory of its own.
#pragma once

#include "cpu/step/buckets.h"

#include <vector>

namespace optim8 {

class DirectMemory;  // cpu/direct_io.h

// A file that is mapped from its first byte on.
struct PagedFile {
    Span span;
    int handle;  // to read and write it by
};

struct DiskError {
    int number;  // errno
    bool writing;
};

struct Streaming {
    size_t slots;   // buckets in memory at a time, at most; a thread for each
    int threads;    // that step at a time, at most
    int64_t ahead;  // bytes to have the system fetch before they are read
};

// Steps all buckets: each is read into `memory`, stepped there and written back. Gives false, and has done nothing,
// where that cannot be: `memory` is too small for a bucket, or there is no room for a thread. Throws DiskError; what
// was stepped until then stays stepped.
bool step_copied(const Buckets& buckets, const std::vector<PagedFile>& files, const DirectMemory& memory,
                 const Streaming& how);

}  // namespace optim8
