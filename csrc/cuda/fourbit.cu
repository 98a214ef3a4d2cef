// 4-bit quantization, its inverse, and the product of a packed weight with a vector.
#include "core/fourbit.h"

#include "cuda/kernels.h"
#include "cuda/quantize.h"

OPTIM8_BEGIN
namespace {

static __device__ const FourbitTables nf4_tables = make_fourbit(Fourbit::NF4);
static __device__ const FourbitTables fp4_tables = make_fourbit(Fourbit::FP4);

// The encoder's 32 cells, one in each lane; stands for FourbitTables in core/fourbit.h's encode_fourbit.
struct FourbitEncoder {
    static constexpr int bits = 4;
    LaneTable<float> midpoint;
    LaneTable<int32_t> below, above;

    OPTIM8_DEVICE explicit FourbitEncoder(const FourbitTables& t)
        : midpoint{__ldg(t.midpoint + lane())}, below{__ldg(t.below + lane())}, above{__ldg(t.above + lane())} {}
    OPTIM8_DEVICE uint8_t code(float x, float scale, float reciprocal) const {
        return static_cast<uint8_t>(encode_fourbit(fourbit_quotient(x * scale, reciprocal), *this));
    }
};

template <class T>
__global__ void __launch_bounds__(threads_per_block, 4)
    quantize_fourbit(const Quantize4Job job, const BlockLength blocks) {
    const FourbitEncoder encoder(job.type == Fourbit::NF4 ? nf4_tables : fp4_tables);
    quantize_warp(encoder, static_cast<const T*>(job.values), job.packed, job.absmax, job.size, blocks);
}

// A tile a warp; a lane's eight values are four neighbouring bytes, all of one block.
template <class T>
__global__ void __launch_bounds__(threads_per_block, 4)
    dequantize_fourbit(const Dequantize4Job job, Fourbit type, const BlockLength blocks) {
    const float* table = type == Fourbit::NF4 ? nf4_tables.value : fp4_tables.value;
    const int64_t at = warp_of_grid() * tile;
    if (at >= job.size) return;
    const int count = values_in_tile(job.size, at), mine = lane() * per_lane;
    const uint8_t* packed = job.packed + at / 2;
    T* out = static_cast<T*>(job.out) + at;
    uint8_t pairs[per_lane / 2];
    if (count == tile && packed_well<uint8_t, per_lane / 2>(packed)) {
        const uint32_t packet = __ldcs(reinterpret_cast<const uint32_t*>(packed) + lane());
        std::memcpy(pairs, &packet, sizeof packet);
    } else {
        for (int i = 0; i < per_lane / 2; ++i) pairs[i] = mine + 2 * i < count ? packed[mine / 2 + i] : 0;
    }
    const float absmax = mine < count ? __ldg(job.absmax + blocks.block_of(at + mine)) : 0.0f;
    T values[per_lane];
#pragma unroll
    for (int k = 0; k < per_lane; ++k) {
        const int code = k % 2 == 0 ? pairs[k / 2] >> 4 : pairs[k / 2] & 15;
        values[k] = from_float<T>(__ldg(table + code) * absmax);
    }
    store_tile<per_lane>(out, count, count == tile && packed_well<T, per_lane>(out), values);
}

constexpr int row_lanes = 16;  // a row's sum is 16 sums, added up in a tree: the order that the CPU has
constexpr int group_columns = row_lanes * per_lane;

OPTIM8_DEVICE float sum_of_lanes(float x) {
    for (int half = row_lanes / 2; half > 0; half /= 2) x += __shfl_down_sync(whole_warp, x, half, row_lanes);
    return x;
}

// Half a warp a row. Where rows are whole groups of 128 columns, a lane takes eight neighbouring columns of each, one
// packet of codes, and multiplies their sum by absmax once.
template <class V>
OPTIM8_DEVICE float whole_groups(const CudaGemv4Job& job, const BlockLength& blocks, int64_t row, int column_lane) {
    const V* vector = static_cast<const V*>(job.vector) + column_lane * per_lane;
    const uint8_t* packed = job.packed + (row * job.columns + column_lane * per_lane) / 2;
    const bool well = packed_well<V, per_lane>(vector) && packed_well<uint8_t, per_lane / 2>(packed);
    float sum = 0.0f;
    for (int64_t k = 0; k < job.columns; k += group_columns) {
        V x[per_lane];
        uint8_t pairs[per_lane / 2];
        if (well) {
            load_packets(vector + k, x);
            load_packets(packed + k / 2, pairs);
        } else {
            for (int i = 0; i < per_lane; ++i) x[i] = vector[k + i];
            for (int i = 0; i < per_lane / 2; ++i) pairs[i] = packed[k / 2 + i];
        }
        float product = 0.0f;
#pragma unroll
        for (int i = 0; i < per_lane / 2; ++i) {
            product = fma(__ldg(job.table + (pairs[i] & 15)), to_float(x[2 * i + 1]), product);
            product = fma(__ldg(job.table + (pairs[i] >> 4)), to_float(x[2 * i]), product);
        }
        const float absmax = __ldg(job.absmax + blocks.block_of(row * job.columns + k + column_lane * per_lane));
        sum = fma(product, absmax, sum);
    }
    return sum;
}

// Rows of any length, which may begin within a byte and within a block: one column after the other.
template <class V>
OPTIM8_DEVICE float any_columns(const CudaGemv4Job& job, const BlockLength& blocks, int64_t row, int column_lane) {
    const V* vector = static_cast<const V*>(job.vector);
    float sum = 0.0f;
    for (int64_t k = column_lane; k < job.columns; k += row_lanes) {
        const int64_t i = row * job.columns + k;
        const int code = job.packed[i / 2] >> (i % 2 == 0 ? 4 : 0) & 15;
        sum = fma(__ldg(job.table + code) * __ldg(job.absmax + blocks.block_of(i)), to_float(vector[k]), sum);
    }
    return sum;
}

template <class V, class T>
__global__ void __launch_bounds__(threads_per_block, 4) gemv_fourbit(const CudaGemv4Job job, const BlockLength blocks) {
    const int64_t row = warp_of_grid() * 2 + lane() / row_lanes;
    const bool there = row < job.rows;  // the other half of the last warp only takes part in the shuffles
    const int column_lane = lane() % row_lanes;
    float sum = 0.0f;
    if (there)
        sum = job.columns % group_columns == 0 ? whole_groups<V>(job, blocks, row, column_lane)
                                               : any_columns<V>(job, blocks, row, column_lane);
    sum = sum_of_lanes(sum);
    if (there && column_lane == 0) static_cast<T*>(job.out)[row] = from_float<T>(sum);
}

}  // namespace
OPTIM8_END

void optim8::cuda_quantize_4bit(const Quantize4Job& job, cudaStream_t stream) {
    const BlockLength blocks(job.blocksize);
    with_storage(job.storage, [&](auto stored) {
        using T = typename decltype(stored)::type;
        launch("quantize_4bit", quantize_fourbit<T>, quantize_warps<T>(job.size, blocks), stream, job, blocks);
    });
}

void optim8::cuda_dequantize_4bit(const Dequantize4Job& job, Fourbit type, cudaStream_t stream) {
    with_storage(job.storage, [&](auto stored) {
        launch("dequantize_4bit", dequantize_fourbit<typename decltype(stored)::type>, tiles_of(job.size), stream, job,
               type, BlockLength(job.blocksize));
    });
}

void optim8::cuda_gemv_4bit(const CudaGemv4Job& job, cudaStream_t stream) {
    with_storage(job.vector_storage, [&](auto stored_vector) {
        with_storage(job.storage, [&](auto stored) {
            launch("gemv_4bit", gemv_fourbit<typename decltype(stored_vector)::type, typename decltype(stored)::type>,
                   job.rows / 2 + job.rows % 2, stream, job, BlockLength(job.blocksize));
        });
    });
}
