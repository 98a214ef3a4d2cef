// Arrays made by new are what kernels may touch, in a program that has this: those of the comparisons' Buffers. What
// is no array, such as a launch's parameters before they are copied, a kernel may not.
#include "ptx.h"

#include <cstdlib>
#include <new>

void* operator new[](size_t bytes) {
    void* memory = std::malloc(bytes + (bytes == 0));
    if (memory == nullptr) throw std::bad_alloc();
    ptx::add_memory(memory, bytes);
    return memory;
}
void operator delete[](void* memory) noexcept {
    ptx::remove_memory(memory);
    std::free(memory);
}
void operator delete[](void* memory, size_t) noexcept { operator delete[](memory); }
