// The part of the CUDA runtime that the objects of csrc/cuda and csrc/bind/cuda call, without a GPU: kernels run at
// once, from their PTX, in the folder that OPTIM8_PTX names. The functions of `fake_cuda` are for tests.
#include "ptx.h"

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>

// That of the shim, which only the comparison of cuda_on_cpu has.
namespace cuda_on_cpu {
extern __attribute__((weak)) long launches_with_memory;
}

namespace {

struct Launch {
    std::string kernel;
    unsigned blocks, threads, parameter_bytes, shared_bytes;
    const void* stream;
    int device;
};

std::map<const void*, std::string>& names() {
    static std::map<const void*, std::string> of_stubs;
    return of_stubs;
}
std::vector<Launch> launches;
int current_device = 0, launches_until_error = -1;
cudaError_t chosen_error = cudaSuccess, last_error = cudaSuccess;
std::string fault;  // what the last error says

// What the driver allows a kernel, from CUDA 12.1 on.
constexpr unsigned most_parameter_bytes = 32764;
// So small a device has much work soon.
constexpr int multiprocessors = 2, most_shared_bytes = 227 * 1024;

void load() {
    static const bool loaded = [] {
        const char* folder = std::getenv("OPTIM8_PTX");
        if (folder == nullptr) throw ptx::Fault("OPTIM8_PTX must name the folder of the PTX");
        const std::map<std::string, ptx::Approximation> approximations = {{"low", ptx::Approximation::Low},
                                                                          {"high", ptx::Approximation::High},
                                                                          {"mixed", ptx::Approximation::Mixed},
                                                                          {"nearest", ptx::Approximation::Nearest}};
        if (const char* name = std::getenv("OPTIM8_PTX_APPROXIMATION")) ptx::approximation = approximations.at(name);
        ptx::load(folder);
        return true;
    }();
    (void)loaded;
}

ptx::Kernel& kernel_of(const void* stub) {
    load();
    const auto name = names().find(stub);
    if (name == names().end()) throw ptx::Fault("no such kernel was registered");
    return ptx::kernel(name->second);
}

cudaError_t fail(cudaError_t error, const std::string& what = "as the test asked for") {
    fault = what;
    return last_error = error;
}

// OPTIM8_PTX_LAUNCHES names a file that gets the name of each kernel that is launched.
void note(const std::string& kernel) {
    static const char* path = std::getenv("OPTIM8_PTX_LAUNCHES");
    static std::ofstream file(path == nullptr ? "" : path);
    if (path != nullptr) file << kernel << '\n';
}

cudaError_t launch(const void* stub, dim3 grid, dim3 block, size_t shared, void** arguments, cudaStream_t stream) {
    if (launches_until_error >= 0 && launches_until_error-- == 0) return fail(chosen_error);
    try {
        ptx::Kernel& kernel = kernel_of(stub);
        if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y != 1 || grid.z != 1 || block.y != 1 || block.z != 1 ||
            block.x == 0 || block.x > kernel.most_threads || kernel.parameter_bytes > most_parameter_bytes ||
            shared > kernel.most_shared_bytes)
            return fail(cudaErrorInvalidConfiguration, "more than the kernel allows");
        const auto shared_bytes = static_cast<unsigned>(shared);
        note(kernel.name);
        launches.push_back(
            {kernel.name, grid.x, block.x, kernel.parameter_bytes, shared_bytes, stream, current_device});
        if (shared > 0 && &cuda_on_cpu::launches_with_memory != nullptr) ++cuda_on_cpu::launches_with_memory;
        ptx::run(kernel, grid.x, block.x, shared_bytes, arguments);
    } catch (const ptx::Fault& problem) {
        return fail(cudaErrorIllegalAddress, problem.what());
    }
    return cudaSuccess;
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) {
    static void* handle = nullptr;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
    names()[stub] = name;
}
// Nobody launches with <<<>>>.
unsigned __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { std::abort(); }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { std::abort(); }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { std::abort(); }

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* stub, void** arguments) {
    if (config->numAttrs != 0) return fail(cudaErrorNotSupported, "attributes are not known here");
    return launch(stub, config->gridDim, config->blockDim, config->dynamicSmemBytes, arguments, config->stream);
}
cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > most_shared_bytes)
        return fail(cudaErrorInvalidValue, "no such attribute is known here");
    try {
        kernel_of(stub).most_shared_bytes = static_cast<uint32_t>(value);
    } catch (const ptx::Fault& problem) {
        return fail(cudaErrorInvalidDeviceFunction, problem.what());
    }
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount:
            return *value = multiprocessors, cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            return *value = most_shared_bytes, cudaSuccess;
        case cudaDevAttrComputeCapabilityMajor:
            try {
                load();
            } catch (const ptx::Fault& problem) {
                return fail(cudaErrorInvalidDevice, problem.what());
            }
            return *value = ptx::architecture() / 10, cudaSuccess;
        default:
            return fail(cudaErrorInvalidValue, "no such attribute is known here");
    }
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* stub) {
    if (launches_until_error >= 0 && launches_until_error-- == 0) return fail(chosen_error);
    try {
        const ptx::Kernel& kernel = kernel_of(stub);
        *attributes = {};
        attributes->binaryVersion = attributes->ptxVersion = kernel.architecture;
        attributes->maxThreadsPerBlock = static_cast<int>(kernel.most_threads);
    } catch (const ptx::Fault& problem) {
        return fail(cudaErrorInvalidDeviceFunction, problem.what());
    }
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
    try {
        for (size_t i = 0; i < bytes; ++i)
            *ptx::memory(reinterpret_cast<uint64_t>(at) + i, 1, true, ptx::Instruction()) = static_cast<uint8_t>(value);
    } catch (const ptx::Fault& problem) {
        return fail(cudaErrorInvalidValue, problem.what());
    }
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaGetLastError() {
    const cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
const char* cudaGetErrorName(cudaError_t) { return "cudaErrorOfTheTest"; }
const char* cudaGetErrorString(cudaError_t) { return fault.c_str(); }

#define FOR_TESTS __attribute__((visibility("default")))
FOR_TESTS void fake_cuda_set_device(int device) { current_device = device; }
// The launch after `launches` others gives an error instead.
FOR_TESTS void fake_cuda_fail(int launches, int error) {
    launches_until_error = launches;
    chosen_error = static_cast<cudaError_t>(error);
}
FOR_TESTS int fake_cuda_launches() { return static_cast<int>(launches.size()); }
FOR_TESTS const char* fake_cuda_launch(int i) {
    static std::string text;
    const Launch& launch = launches.at(static_cast<size_t>(i));
    char numbers[100];
    std::snprintf(numbers, sizeof numbers, " %u %u %u %u %p %d", launch.blocks, launch.threads, launch.parameter_bytes,
                  launch.shared_bytes, launch.stream, launch.device);
    text = launch.kernel + numbers;
    return text.c_str();
}

}  // extern "C"
