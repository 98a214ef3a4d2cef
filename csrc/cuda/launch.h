// Starting a kernel from host code, and what goes wrong as a C++ exception.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#define OPTIM8_DEVICE __device__ __forceinline__

namespace optim8 {

constexpr int warp_size = 32;
constexpr int warps_per_block = 4;
constexpr int threads_per_block = warp_size * warps_per_block;

inline void check_cuda(const char* who, cudaError_t status) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // an error that does not stay must not surface in a later call of somebody else
    std::string message =
        std::string(who) + ": CUDA says " + cudaGetErrorName(status) + ", " + cudaGetErrorString(status) + ".";
    if (status == cudaErrorNoKernelImageForDevice)
        message += " The module was not built for this GPU: reinstall with OPTIM8_CUDA_ARCHS naming its architecture.";
    throw std::runtime_error(message);
}

// One launch with at least `warps` warps; none where there is nothing to do.
template <class... Needed, class... Given>
void launch(const char* who, void (*kernel)(Needed...), int64_t warps, cudaStream_t stream, const Given&... given) {
    if (warps <= 0) return;
    const int64_t blocks = (warps + warps_per_block - 1) / warps_per_block;
    if (blocks > INT32_MAX) throw std::runtime_error(std::string(who) + ": the tensor is too large for one launch.");
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks), 1, 1);
    config.blockDim = dim3(threads_per_block, 1, 1);
    config.stream = stream;
    check_cuda(who, cudaLaunchKernelEx(&config, kernel, given...));
}

}  // namespace optim8
