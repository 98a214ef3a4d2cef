// What differs between the compilers of csrc/core: host or device, and the namespace of one instruction set.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define OPTIM8_HD __host__ __device__ __forceinline__
#else
#define OPTIM8_HD inline __attribute__((always_inline))
#endif

// Every instruction set is compiled in a namespace of its own: two copies of one template, built with different
// flags, must never be merged by the linker, or the portable path would run the fastest machine's instructions.
#ifndef OPTIM8_ISA
#define OPTIM8_ISA base
#endif
#define OPTIM8_BEGIN \
    namespace optim8 { \
    inline namespace OPTIM8_ISA {
#define OPTIM8_END \
    } \
    }
