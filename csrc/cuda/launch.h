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

// Drivers that take more than 4 KB of parameters at a launch: R530, which came with CUDA 12.1.
constexpr int oldest_driver = 12010;

// What to do about an error; empty where CUDA's own words say it.
inline const char* advice_for(cudaError_t status) {
    switch (status) {
        case cudaErrorNoKernelImageForDevice:
            return " The module was not built for this GPU: reinstall with OPTIM8_CUDA_ARCHS naming its architecture.";
        case cudaErrorInsufficientDriver:
            return " The driver is older than the CUDA toolkit that the module was built with, or there is none: "
                   "update "
                   "the driver, or reinstall with an older toolkit.";
        case cudaErrorUnsupportedPtxVersion:
            return " The driver is older than the CUDA toolkit that the module was built with, and the module has only "
                   "PTX for this GPU: update the driver, or reinstall with OPTIM8_CUDA_ARCHS naming its architecture.";
        case cudaErrorIllegalAddress:
            return " A kernel, of optim8 or of any other library, and perhaps of an earlier call, read or wrote memory "
                   "that is not there; this process cannot use the GPU any more. CUDA_LAUNCH_BLOCKING=1 shows the "
                   "call.";
        default: {
            int driver = 0;
            if (cudaDriverGetVersion(&driver) == cudaSuccess && driver > 0 && driver < oldest_driver)
                return " optim8 needs a driver for CUDA 12.1 or newer (R530): update it.";
            return "";
        }
    }
}

inline void check_cuda(const char* who, cudaError_t status) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // an error that does not stay must not surface in a later call of somebody else
    throw std::runtime_error(std::string(who) + ": CUDA says " + cudaGetErrorName(status) + ", " +
                             cudaGetErrorString(status) + "." + advice_for(status));
}

template <class... Needed, class... Given>
void launch_blocks(const char* who, void (*kernel)(Needed...), int64_t blocks, int threads, size_t shared,
                   cudaStream_t stream, const Given&... given) {
    if (blocks > INT32_MAX) throw std::runtime_error(std::string(who) + ": the tensor is too large for one launch.");
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks), 1, 1);
    config.blockDim = dim3(static_cast<unsigned>(threads), 1, 1);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    check_cuda(who, cudaLaunchKernelEx(&config, kernel, given...));
}
// One launch with at least `warps` warps; none where there is nothing to do.
template <class... Needed, class... Given>
void launch(const char* who, void (*kernel)(Needed...), int64_t warps, cudaStream_t stream, const Given&... given) {
    if (warps <= 0) return;
    const int64_t blocks = (warps + warps_per_block - 1) / warps_per_block;
    launch_blocks(who, kernel, blocks, threads_per_block, 0, stream, given...);
}

// The current device's value of an attribute; 0 where it has none.
inline int device_attribute(cudaDeviceAttr attribute) {
    int device = 0, value = 0;
    const bool known =
        cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess;
    if (!known) cudaGetLastError();  // as in check_cuda
    return known ? value : 0;
}
// Whether a kernel may have so many bytes of dynamic shared memory on the current device; lets it have them.
template <class... Needed>
bool allow_shared(void (*kernel)(Needed...), int bytes) {
    if (device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) < bytes) return false;
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) == cudaSuccess) return true;
    cudaGetLastError();
    return false;
}

}  // namespace optim8
