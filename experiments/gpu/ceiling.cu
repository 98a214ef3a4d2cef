// The accesses of an optimizer step over whole blocks and none of its arithmetic: what the memory allows a step. As the
// step does it, a warp takes a block of 256 values, eight to a lane: parameter, gradient, codes and a scale a state are
// loaded, and all but the gradient are stored. gpu/measure.py compiles and times it.
#include "cuda/lanes.h"

OPTIM8_BEGIN
namespace {

constexpr int most_states = 2;
struct Arrays {
    void* param;
    const void* grad;
    uint8_t* codes[most_states];
    float* absmax[most_states];
};

// `bits`: 0, which the compiler cannot know: with it nothing changes, and no load can be left out.
template <class T, int states>
__global__ void __launch_bounds__(threads_per_block, 4) ceiling(Arrays arrays, int64_t blocks, uint32_t bits) {
    constexpr int span = packet_span<T>, words = per_lane * sizeof(T) / 4;
    const int64_t warps = static_cast<int64_t>(gridDim.x) * warps_per_block;
    for (int64_t block = warp_of_grid(); block < blocks; block += warps) {
        T* const param_at = static_cast<T*>(arrays.param) + block * tile + place<span>(0);
        uint32_t param[words], grad[words], codes[states][per_lane / 4];
        float absmax[states];
        load_words<span>(param_at, param);
        load_words<span>(static_cast<const T*>(arrays.grad) + block * tile + place<span>(0), grad);
#pragma unroll
        for (int s = 0; s < states; ++s) {
            load_bytes<span>(arrays.codes[s] + block * tile, codes[s]);
            absmax[s] = arrays.absmax[s][block];
        }
#pragma unroll
        for (int i = 0; i < words; ++i) param[i] ^= grad[i] & bits;
        store_words<span>(param_at, param);
#pragma unroll
        for (int s = 0; s < states; ++s) {
            store_bytes<span>(arrays.codes[s] + block * tile, codes[s]);
            if (lane() == 0) arrays.absmax[s][block] = absmax[s];
        }
    }
}

template <class T, int states>
int start(const Arrays& arrays, int64_t blocks, void* stream) {
    int device = 0, processors = 0, of_each = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_each, ceiling<T, states>, threads_per_block, 0);
    const int64_t wanted = (blocks + warps_per_block - 1) / warps_per_block;
    const int64_t most = static_cast<int64_t>(processors) * (of_each > 0 ? of_each : 1);
    ceiling<T, states><<<static_cast<unsigned>(wanted < most ? wanted : most), threads_per_block, 0,
                         static_cast<cudaStream_t>(stream)>>>(arrays, blocks, 0);
    return static_cast<int>(cudaGetLastError());
}

}  // namespace
OPTIM8_END

// Launches it over `blocks` blocks of 256 values; gives CUDA's error, 0 for none. `bytes`: of a parameter, 2 or 4;
// `states`: 1 or 2.
extern "C" int optim8_ceiling(int bytes, int states, void* param, const void* grad, uint8_t* codes0, uint8_t* codes1,
                              float* absmax0, float* absmax1, int64_t blocks, void* stream) {
    using namespace optim8::base;
    const Arrays arrays{param, grad, {codes0, codes1}, {absmax0, absmax1}};
    if (bytes == 4)
        return states == 1 ? start<float, 1>(arrays, blocks, stream) : start<float, 2>(arrays, blocks, stream);
    return states == 1 ? start<bfloat16, 1>(arrays, blocks, stream) : start<bfloat16, 2>(arrays, blocks, stream);
}
