// Kernels with one mistake each, and one without: what the shim and the sanitizers must notice. The argument names one.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

namespace {

constexpr int threads = 64;
constexpr unsigned everyone = 0xffffffffu;

__global__ void right(float* values) {
    __shared__ float shared[threads];
    const int i = static_cast<int>(threadIdx.x);
    shared[i] = values[i];
    __syncthreads();
    values[i] = __shfl_sync(everyone, shared[threads - 1 - i], 31);
}
__global__ void missing_barrier(float* values) {
    __shared__ float shared[threads];
    const int i = static_cast<int>(threadIdx.x);
    shared[i] = values[i];
    values[i] = shared[threads - 1 - i];
}
__global__ void barrier_not_for_all(float* values) {
    if (threadIdx.x < 40) __syncthreads();
    values[threadIdx.x] = 1;
}
__global__ void overrun(float* values) { values[threadIdx.x + 1] = 1; }
__global__ void shared_overrun(float* values) {
    __shared__ float shared[threads - 1];
    shared[threadIdx.x] = values[threadIdx.x];
    values[threadIdx.x] = shared[0];
}
__global__ void misaligned_packet(float* values) {
    if (threadIdx.x == 0) values[8] = static_cast<float>(__ldcs(reinterpret_cast<const uint4*>(values + 1)).x);
}
__global__ void mask_without_caller(float* values) {
    values[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, values[threadIdx.x], 1);
}
__global__ void mask_without_source(float* values) {
    if (threadIdx.x % 32 < 16) values[threadIdx.x] = __shfl_sync(0x0000ffffu, values[threadIdx.x], 20);
}
__global__ void mask_with_lanes_that_left(float* values) {
    if (threadIdx.x % 32 >= 20) return;
    values[threadIdx.x] = __shfl_xor_sync(everyone, values[threadIdx.x], 1);
}
__global__ void masks_that_differ(float* values) {
    const unsigned mask = threadIdx.x % 2 == 0 ? everyone : 0xfffffffeu;
    values[threadIdx.x] = __shfl_sync(mask, values[threadIdx.x], 5);
}

}  // namespace

int main(int count, char** arguments) {
    const std::map<std::string, void (*)(float*)> kernels = {
        {"right", right},
        {"missing_barrier", missing_barrier},
        {"barrier_not_for_all", barrier_not_for_all},
        {"overrun", overrun},
        {"shared_overrun", shared_overrun},
        {"misaligned_packet", misaligned_packet},
        {"mask_without_caller", mask_without_caller},
        {"mask_without_source", mask_without_source},
        {"mask_with_lanes_that_left", mask_with_lanes_that_left},
        {"masks_that_differ", masks_that_differ},
    };
    if (count != 2 || kernels.count(arguments[1]) == 0) return 2;
    float* values = static_cast<float*>(std::calloc(threads, sizeof(float)));
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(2);
    config.blockDim = dim3(threads);
    cudaLaunchKernelEx(&config, kernels.at(arguments[1]), values);
    std::free(values);
    std::puts("nothing noticed");
}
