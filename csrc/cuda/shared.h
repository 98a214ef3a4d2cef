// Shared memory of a size that a launch chooses, by addresses of 32 bits. Where no nvcc compiles, whoever stands for
// CUDA has all of this.
#pragma once

#include "core/scalar.h"
#include "cuda/launch.h"

OPTIM8_BEGIN

#if defined(__CUDACC__)
extern __shared__ uint4 dynamic_memory[];
OPTIM8_DEVICE uint32_t dynamic_address() { return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_memory)); }

// What nobody writes any more.
OPTIM8_DEVICE float shared_float(uint32_t address) {
    float x;
    asm("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address));
    return x;
}
OPTIM8_DEVICE uint4 shared_packet(uint32_t address) {
    uint4 x;
    asm("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(address));
    return x;
}
OPTIM8_DEVICE uint32_t load_shared(uint32_t address) {
    uint32_t x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
    return x;
}
OPTIM8_DEVICE void store_shared(uint32_t address, uint32_t x) {
    asm volatile("st.shared.u32 [%0], %1;" : : "r"(address), "r"(x) : "memory");
}
OPTIM8_DEVICE void store_shared(uint32_t address, uint4 x) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
                 :
                 : "r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
}
OPTIM8_DEVICE void or_shared(uint32_t address, uint32_t bits) {
    asm volatile("red.shared.or.b32 [%0], %1;" : : "r"(address), "r"(bits) : "memory");
}
#endif

OPTIM8_END
