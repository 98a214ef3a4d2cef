// Blockwise quantization to 8-bit codes and back, by the dynamic code's closed form or any table of 256 sorted values.
#include "cuda/kernels.h"
#include "cuda/quantize.h"
#include "cuda/tables.h"

OPTIM8_BEGIN
namespace {

constexpr const char* quantizing = "quantize_blockwise";

// NaN is stored as 0 is, an infinity as the last code of its sign.
template <class Finite>
OPTIM8_DEVICE uint8_t code_of_any(float x, float scale, const Finite& code_of_finite) {
    const uint32_t magnitude = magnitude_bits(x);
    const uint8_t code = code_of_finite(magnitude < inf_bits ? x * scale : 0.0f);
    return magnitude == inf_bits ? (x > 0.0f ? code_size - 1 : 0) : code;
}

template <Code kind>
struct DynamicEncoder {
    static constexpr int bits = 8;
    LaneCode<kind> tables = lane_code<kind>();
    OPTIM8_DEVICE uint8_t code(float x, float scale, float reciprocal) const {
        return code_of_any(x, scale, [&](float finite) {
            return static_cast<uint8_t>(encode_lane<kind>(finite, reciprocal, tables));
        });
    }
};

struct AnyEncoder {
    static constexpr int bits = 8;
    const float* middle;
    OPTIM8_DEVICE uint8_t code(float x, float scale, float reciprocal) const {
        return code_of_any(x, scale, [&](float finite) { return search(finite * reciprocal, middle); });
    }
};

// code_info[0..254]: the midpoints; code_info[255]: which code it is. One warp, eight entries a lane.
__global__ void describe_code(const float* code, float* code_info) {
    if (warp_of_grid() != 0) return;
    bool is_signed = true, is_unsigned = true;
    for (int i = lane(); i < code_size; i += warp_size) {
        is_signed = is_signed && bits_of(code[i]) == bits_of(__ldg(signed_tables.value + i));
        is_unsigned = is_unsigned && bits_of(code[i]) == bits_of(__ldg(unsigned_tables.value + i));
        if (i + 1 < code_size) code_info[i] = midpoint(code[i], code[i + 1]);
    }
    is_signed = __all_sync(whole_warp, is_signed) != 0;
    is_unsigned = __all_sync(whole_warp, is_unsigned) != 0;
    const CodeKind kind = is_signed ? CodeKind::Signed : is_unsigned ? CodeKind::Unsigned : CodeKind::Any;
    if (lane() == 0) code_info[code_size - 1] = static_cast<float>(static_cast<int>(kind));
}

template <class T>
__global__ void __launch_bounds__(threads_per_block, 4)
    quantize_blocks(const QuantizeJob job, const BlockLength blocks) {
    const T* values = static_cast<const T*>(job.values);
    const CodeKind kind =
        job.kind != CodeKind::Any ? job.kind : static_cast<CodeKind>(static_cast<int>(job.middle[code_size - 1]));
    switch (kind) {
        case CodeKind::Signed:
            return quantize_warp(DynamicEncoder<Code::Signed>(), values, job.codes, job.absmax, job.size, blocks);
        case CodeKind::Unsigned:
            return quantize_warp(DynamicEncoder<Code::Unsigned>(), values, job.codes, job.absmax, job.size, blocks);
        case CodeKind::Positive:
            return quantize_warp(DynamicEncoder<Code::Positive>(), values, job.codes, job.absmax, job.size, blocks);
        case CodeKind::Any:
            return quantize_warp(AnyEncoder{job.middle}, values, job.codes, job.absmax, job.size, blocks);
    }
}

// A tile a warp, whatever the block size; the table is read through the cache.
template <class T>
__global__ void __launch_bounds__(threads_per_block, 4)
    dequantize_tiles(const DequantizeJob job, const BlockLength blocks) {
    constexpr int span = packet_span<T>;
    const int64_t at = warp_of_grid() * tile;
    if (at >= job.size) return;
    const int count = values_in_tile(job.size, at);
    T* out = static_cast<T*>(job.out) + at;
    uint8_t codes[per_lane];
    T values[per_lane];
    load_tile<span>(job.codes + at, count, count == tile && packed_well<uint8_t, span>(job.codes + at), uint8_t{0},
                    codes);
    const auto decode_run = [&](int first, int n) {
        const int i = place<span>(first);
        const float absmax = i < count ? __ldg(job.absmax + blocks.block_of(at + i)) : 0.0f;
        for (int k = first; k < first + n; ++k) values[k] = from_float<T>(__ldg(job.code + codes[k]) * absmax);
    };
    if (blocks.holds_runs_of(span)) {
#pragma unroll
        for (int k = 0; k < per_lane; k += span) decode_run(k, span);
    } else {
#pragma unroll
        for (int k = 0; k < per_lane; ++k) decode_run(k, 1);
    }
    store_tile<span>(out, count, count == tile && packed_well<T, span>(out), values);
}

}  // namespace
OPTIM8_END

void optim8::cuda_quantize(QuantizeJob job, float* code_info, cudaStream_t stream) {
    if (job.kind == CodeKind::Any) {
        launch(quantizing, describe_code, 1, stream, job.code, code_info);
        job.middle = code_info;
    }
    const BlockLength blocks(job.blocksize);
    with_storage(job.storage, [&](auto stored) {
        using T = typename decltype(stored)::type;
        launch(quantizing, quantize_blocks<T>, quantize_warps<T>(job.size, blocks), stream, job, blocks);
    });
}

optim8::KernelImage optim8::cuda_image() {
    cudaFuncAttributes attributes{};
    check_cuda("optim8._cuda", cudaFuncGetAttributes(&attributes, dequantize_tiles<float>));
    return {attributes.binaryVersion, attributes.ptxVersion};
}

void optim8::cuda_dequantize(const DequantizeJob& job, cudaStream_t stream) {
    with_storage(job.storage, [&](auto stored) {
        launch("dequantize_blockwise", dequantize_tiles<typename decltype(stored)::type>, tiles_of(job.size), stream,
               job, BlockLength(job.blocksize));
    });
}
