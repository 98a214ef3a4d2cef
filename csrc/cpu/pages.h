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
