// What the operating system is told about pages of a memory-mapped file.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace optim8 {

// Have the pages read before they are asked for. Does not wait.
inline bool fetch_pages(uintptr_t begin, uintptr_t end) {
#if defined(__linux__)
    return madvise(reinterpret_cast<void*>(begin), end - begin, MADV_WILLNEED) == 0;
#else
    return begin <= end;
#endif
}

// Whether a page is in memory. Where the system does not tell, it counts as such.
inline bool page_in_memory(uintptr_t page) {
#if defined(__linux__)
    unsigned char flags = 0;
    return mincore(reinterpret_cast<void*>(page), 1, &flags) != 0 || (flags & 1) != 0;
#else
    return page != 0;
#endif
}

// Map the pages for writing, in one go. A kernel that reads them first and then writes would pay for two faults of each
// page, and for the second one dearly. Advice only: where the system does not know it (before Linux 5.14), that
// happens.
inline void open_pages(uintptr_t begin, uintptr_t end) {
#if defined(__linux__)
    constexpr int populate_write = 23;  // MADV_POPULATE_WRITE, which old headers lack
    madvise(reinterpret_cast<void*>(begin), end - begin, populate_write);
#else
    (void)begin;
    (void)end;
#endif
}

// Take the pages out of this process. Only for a shared mapping of a file, whose contents the system keeps; other
// memory would lose them.
inline bool release_pages(uintptr_t begin, uintptr_t end) {
#if defined(__linux__)
    return madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED) == 0;
#else
    return begin <= end;
#endif
}

}  // namespace optim8
