// What compilers call by themselves, for a program without libraries.
#include <cstddef>

extern "C" {
void* memcpy(void* to, const void* from, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) static_cast<char*>(to)[i] = static_cast<const char*>(from)[i];
    return to;
}
void* memset(void* to, int byte, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) static_cast<char*>(to)[i] = static_cast<char>(byte);
    return to;
}
}
