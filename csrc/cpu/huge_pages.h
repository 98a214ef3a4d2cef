// Large results are usually memory that nobody has touched yet. The kernel hands it out page by page while a kernel
// writes to it, and that can cost more than the work itself; asked for huge pages, it does so far less often.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace optim8 {

// Advice only: without effect on memory that has pages already, or that cannot have huge ones.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t page = 4096;
    if (bytes < (int64_t{4} << 20)) return;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) & ~(page - 1);
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(page - 1);
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)data;
    (void)bytes;
#endif
}

}  // namespace optim8
