// The part of CUDA that csrc/cuda uses, on the CPU, for tests: every thread of a block is a fiber, blocks run one after
// the other, barriers and warp operations check what CUDA leaves undefined. Not a fast way to run a kernel.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#define __global__ static
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __launch_bounds__(...)

struct alignas(8) float2 {
    float x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_on_cpu {

enum class Order { Forward, Reverse, Random, InTurn };

// How the threads of a block take turns; InTurn: of one block after the other in each of these ways. `seed` is for
// Random.
void set_order(Order order, unsigned seed);

// Calls body(context) once for each thread of each block. `shared`: bytes of dynamic_memory.
void run_grid(dim3 grid, dim3 block, size_t shared, void (*body)(void*), void* context);

const dim3& thread_index();
const dim3& block_index();
extern dim3 grid;
extern long launches_with_memory;  // of dynamic_memory
unsigned char* dynamic_memory();

// What the threads of a barrier or the lanes of a warp operation must agree on, and what a lane gives to it.
enum class Operation { Shuffle, Vote, Largest, Warp };
// Waits for every lane of `mask`, then gives what lane `source` gave as `value`; ends the program where a lane may not
// take part so.
uint64_t meet(Operation operation, unsigned mask, uint64_t value, int source);
void meet_block();

template <class T>
T exchange(unsigned mask, T value, int source) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = meet(Operation::Shuffle, mask, bits, source);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline int lane() { return static_cast<int>(thread_index().x % 32); }

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::thread_index())
#define blockIdx (cuda_on_cpu::block_index())
inline const dim3& gridDim = cuda_on_cpu::grid;  // no macro: a launch has a member of this name

inline void __syncthreads() { cuda_on_cpu::meet_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_on_cpu::meet(cuda_on_cpu::Operation::Warp, mask, 0, -1); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    return cuda_on_cpu::exchange(mask, value, (cuda_on_cpu::lane() & ~(width - 1)) + (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    const int source = cuda_on_cpu::lane() ^ bits;
    const bool inside = source / width == cuda_on_cpu::lane() / width;
    return cuda_on_cpu::exchange(mask, value, inside ? source : cuda_on_cpu::lane());
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
    const int source = cuda_on_cpu::lane() + static_cast<int>(by);
    const bool inside = source / width == cuda_on_cpu::lane() / width;
    return cuda_on_cpu::exchange(mask, value, inside ? source : cuda_on_cpu::lane());
}
// Votes: bit l of what comes back is the predicate of lane l.
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    return static_cast<unsigned>(cuda_on_cpu::meet(cuda_on_cpu::Operation::Vote, mask, predicate != 0, -1));
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
    return static_cast<unsigned>(cuda_on_cpu::meet(cuda_on_cpu::Operation::Largest, mask, value, -1));
}
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

// Bytes of the eight in (high, low) by the nibbles of `selector`.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i)
        result |= static_cast<unsigned>(bytes >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
    return result;
}
// csrc/cuda/lanes.h
inline unsigned permute_signed(unsigned low, unsigned high, unsigned selector) {
    unsigned result = __byte_perm(low, high, selector);
    for (int i = 0; i < 4; ++i) {
        const unsigned byte = 0xffu << (8 * i);
        if (selector >> (4 * i + 3) & 1) result = (result & byte) >> (8 * i + 7) ? result | byte : result & ~byte;
    }
    return result;
}

namespace cuda_on_cpu {

// A sum rounded downwards, or towards 0. Exact in a long double for what the
// kernels add: products of two floats below 2^10, and 2^23.
inline float round_down(long double sum, bool to_zero) {
    const float nearest = static_cast<float>(sum);
    const bool above = to_zero && sum < 0 ? nearest < sum : nearest > sum;
    return above ? std::nextafter(nearest, to_zero ? 0.0f : -INFINITY) : nearest;
}

// csrc/cuda/shared.h over the memory of the launch; a device keeps the first addresses to itself.
constexpr unsigned first_address = 1024;
template <class T>
T* at_address(unsigned address) {
    return reinterpret_cast<T*>(dynamic_memory() + (address - first_address));
}

}  // namespace cuda_on_cpu

inline float __fadd_rd(float a, float b) { return cuda_on_cpu::round_down(static_cast<long double>(a) + b, false); }
inline float __fmaf_rz(float a, float b, float c) {
    return cuda_on_cpu::round_down(static_cast<long double>(a) * b + c, true);
}
// The approximations of csrc/cuda/quick.h; where the hardware's are another ulp, its own sequences allow for that.
inline float reciprocal_approximately(float x) { return 1.0f / x; }
inline float inverse_root_approximately(float x) { return static_cast<float>(1 / std::sqrt(static_cast<double>(x))); }

inline unsigned half_bits(float x) {  // of float16, rounded towards 0; of a normal one, or 0 for less
    unsigned bits;
    std::memcpy(&bits, &x, sizeof bits);
    const unsigned magnitude = bits & 0x7fffffffu, bias = (127 - 15) << 23;
    const unsigned least = 113u << 23, largest = 0x477fe000u;
    return (bits >> 16 & 0x8000u) |
           (magnitude < least ? 0 : ((magnitude < largest ? magnitude : largest) - bias) >> 13);
}
inline unsigned half_pair(float low, float high) { return half_bits(high) << 16 | half_bits(low); }
template <class T>
void keep_in_register(T&) {}

inline unsigned dynamic_address() { return cuda_on_cpu::first_address; }
inline float shared_float(unsigned address) { return *cuda_on_cpu::at_address<float>(address); }
inline uint4 shared_packet(unsigned address) { return *cuda_on_cpu::at_address<uint4>(address); }
inline unsigned load_shared(unsigned address) {
    return __atomic_load_n(cuda_on_cpu::at_address<unsigned>(address), __ATOMIC_RELAXED);
}
template <class T>
void store_shared(unsigned address, T x) {
    *cuda_on_cpu::at_address<T>(address) = x;
}
inline void or_shared(unsigned address, unsigned bits) {
    __atomic_fetch_or(cuda_on_cpu::at_address<unsigned>(address), bits, __ATOMIC_RELAXED);
}

template <class T>
T __ldg(const T* from) {
    return *from;
}
template <class T>
T __ldcs(const T* from) {
    return *from;
}
template <class T>
void __stcs(T* to, T value) {
    *to = value;
}
inline unsigned atomicMax(unsigned* at, unsigned value) {
    const unsigned before = *at;
    *at = before > value ? before : value;
    return before;
}
inline int __dp4a(int a, int b, int sum) {
    for (int byte = 0; byte < 4; ++byte) {
        const int x = static_cast<int8_t>(a >> (8 * byte)), y = static_cast<int8_t>(b >> (8 * byte));
        sum = static_cast<int>(static_cast<unsigned>(sum) + static_cast<unsigned>(x * y));
    }
    return sum;
}

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorUnsupportedPtxVersion = 222,
    cudaErrorIllegalAddress = 700
};
#define CUDART_VERSION 13000
namespace cuda_on_cpu {
// A test's: which error the next launch or question gives, and the driver's version. From the environment, since a
// module is loaded by Python.
inline int setting(const char* name, int otherwise) {
    const char* text = std::getenv(name);
    return text == nullptr ? otherwise : std::atoi(text);
}
inline cudaError_t error() { return static_cast<cudaError_t>(setting("CUDA_ON_CPU_ERROR", cudaSuccess)); }
}  // namespace cuda_on_cpu
struct CUstream_st;
using cudaStream_t = CUstream_st*;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
};
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorOfTheTest"; }
inline const char* cudaGetErrorString(cudaError_t) { return "as the test asked for"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) {
    return *version = cuda_on_cpu::setting("CUDA_ON_CPU_DRIVER", CUDART_VERSION), cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount      ? 2
             : attribute == cudaDevAttrComputeCapabilityMajor ? 9
                                                              : 227 * 1024;
    return cudaSuccess;
}
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
    return cudaSuccess;
}
struct cudaFuncAttributes {
    int binaryVersion, ptxVersion;
};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
    *attributes = {90, 90};
    return cuda_on_cpu::error();
}
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
    return std::memset(at, value, bytes), cudaSuccess;
}

template <class... Needed, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Needed...), const Given&... given) {
    if (cuda_on_cpu::error() != cudaSuccess) return cuda_on_cpu::error();
    // As on the device, every thread sees one copy of the parameters, made at the launch.
    const auto call = [&](Needed... copied) {
        auto body = [&] { kernel(copied...); };
        cuda_on_cpu::run_grid(
            config->gridDim, config->blockDim, config->dynamicSmemBytes,
            [](void* context) { (*static_cast<decltype(body)*>(context))(); }, &body);
    };
    call(given...);
    return cudaSuccess;
}
