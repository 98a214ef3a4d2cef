// LLM.int8(): rows and columns to int8, back, the integer product and its scaling.
#include "core/int8.h"

#include "cuda/kernels.h"
#include "cuda/lanes.h"

OPTIM8_BEGIN
namespace {

// A tile of one row of a matrix; warps count through the tiles of a row, then through the rows.
struct RowTile {
    int64_t row, column;
    int count;  // 0: beyond the matrix
    OPTIM8_DEVICE RowTile(int64_t rows, int64_t columns) {
        const int64_t tiles = columns / tile + (columns % tile != 0);
        row = tiles == 0 ? rows : warp_of_grid() / tiles;
        column = tiles == 0 ? 0 : (warp_of_grid() - row * tiles) * tile;
        count = row < rows ? values_in_tile(columns, column) : 0;
    }
};
int64_t row_tiles(int64_t rows, int64_t columns) { return rows * tiles_of(columns); }

// 32 neighbouring columns a warp, one a lane, and a run of rows.
constexpr int64_t rows_per_warp = 256;
struct ColumnStrip {
    int64_t column, begin, end;
    OPTIM8_DEVICE ColumnStrip(int64_t rows, int64_t columns) {
        const int64_t strips = columns / warp_size + (columns % warp_size != 0);
        column = warp_of_grid() % strips * warp_size + lane();
        begin = warp_of_grid() / strips * rows_per_warp;
        end = column >= columns ? begin : (begin + rows_per_warp < rows ? begin + rows_per_warp : rows);
    }
};
int64_t column_strips(int64_t rows, int64_t columns) {
    return (columns / warp_size + (columns % warp_size != 0)) * (rows / rows_per_warp + (rows % rows_per_warp != 0));
}

template <class T>
__global__ void __launch_bounds__(threads_per_block, 4) mark_outliers(const Int8QuantizeJob job) {
    const RowTile at(job.rows, job.columns);
    const T* values = static_cast<const T*>(job.values) + at.row * job.columns + at.column;
    for (int i = lane(); i < at.count; i += warp_size) {
        const float x = to_float(values[i]);
        if (x >= job.threshold || -x >= job.threshold) job.outliers[at.column + i] = 1;  // by whoever finds one
    }
}

struct Factor {
    double exact;
    bool has_quick;
    float quick;
    OPTIM8_DEVICE explicit Factor(float absmax)
        : exact(int8_factor(absmax)),
          has_quick(has_quick_int8(exact)),
          quick(has_quick ? static_cast<float>(exact) : 0.0f) {}
    // Of anything; the distance of a NaN or an infinity is NaN, which is not below.
    OPTIM8_DEVICE int8_t encode(float x) const {
        const QuickInt8 code = encode_int8_quickly(x, quick);
        if (has_quick && code.distance < int8_sure) return static_cast<int8_t>(code.bits);
        return encode_int8_checked(x, exact);
    }
};

// A warp a row: its largest magnitude below the threshold, then the codes.
template <class T>
__global__ void __launch_bounds__(threads_per_block, 4) quantize_rows(const Int8QuantizeJob job) {
    const int64_t row = warp_of_grid();
    if (row >= job.rows) return;
    const T* values = static_cast<const T*>(job.values) + row * job.columns;
    int8_t* codes = job.codes + row * job.columns;
    const uint32_t limit = bits_of(job.threshold);
    uint32_t largest = 0;
    for (int64_t c = lane(); c < job.columns; c += warp_size) {
        const uint32_t bits = magnitude_bits(to_float(values[c]));
        largest = maximum(largest, bits < limit ? bits : 0u);
    }
    largest = largest_of_lanes(largest, warp_size);
    const Factor factor(float_of(largest));
    for (int64_t c = lane(); c < job.columns; c += warp_size) {
        const bool left_out = job.outliers != nullptr && job.outliers[c] != 0;
        codes[c] = factor.encode(left_out ? 0.0f : to_float(values[c]));
    }
    if (lane() == 0) job.stats[row] = float_of(largest);
}

// `stats` holds zeros at first. Magnitudes order like their bits, so the largest is found by an integer maximum.
template <class T>
__global__ void __launch_bounds__(threads_per_block, 4) column_maxima(const Int8ColumnsJob job) {
    const ColumnStrip at(job.rows, job.columns);
    const uint32_t limit = bits_of(job.threshold);
    uint32_t largest = 0;
    for (int64_t r = at.begin; r < at.end; ++r) {
        const uint32_t bits = magnitude_bits(to_float(static_cast<const T*>(job.values)[r * job.columns + at.column]));
        largest = maximum(largest, bits < limit ? bits : 0u);
    }
    if (at.begin < at.end) atomicMax(reinterpret_cast<unsigned*>(job.stats + at.column), largest);
}

template <class T>
__global__ void __launch_bounds__(threads_per_block, 4) quantize_columns(const Int8ColumnsJob job) {
    const ColumnStrip at(job.rows, job.columns);
    if (at.begin >= at.end) return;
    const uint32_t limit = bits_of(job.threshold);
    const Factor factor(job.stats[at.column]);
    for (int64_t r = at.begin; r < at.end; ++r) {
        const int64_t i = r * job.columns + at.column;
        const float x = to_float(static_cast<const T*>(job.values)[i]);
        const bool left_out = limit < inf_bits && magnitude_bits(x) >= limit;
        job.codes[i] = factor.encode(left_out ? 0.0f : x);
    }
}

__global__ void __launch_bounds__(threads_per_block, 4) dequantize_rows(const Int8DequantizeJob job) {
    const RowTile at(job.rows, job.columns);
    const int64_t first = at.row * job.columns + at.column;
    for (int i = lane(); i < at.count; i += warp_size)
        job.out[first + i] = decode_int8(job.codes[first + i], job.stats[at.row]);
}

template <class T>
__global__ void __launch_bounds__(threads_per_block, 4) scale_rows(const Int8ScaleJob job) {
    const RowTile at(job.rows, job.columns);
    if (at.count == 0) return;
    const int64_t first = at.row * job.columns + at.column;
    const double row_scale = int8_row_scale(job.row_stats[at.row]);
    for (int i = lane(); i < at.count; i += warp_size) {
        const float bias = job.bias == nullptr ? 0.0f : job.bias[at.column + i];
        const float scaled = scale_int8(job.sums[first + i], row_scale, job.column_stats[at.column + i], bias);
        static_cast<T*>(job.out)[first + i] = from_float<T>(scaled);
    }
}

// A warp a sum, four products an instruction where the rows are whole words. Made to be right for every shape, not
// fast.
__global__ void __launch_bounds__(threads_per_block, 4) multiply(const Int8ProductJob job) {
    const int64_t row = warp_of_grid() / job.columns, column = warp_of_grid() % job.columns;
    if (row >= job.rows) return;
    const int8_t *a = job.a + row * job.inner, *b = job.b + column * job.inner;
    unsigned sum = 0;  // unsigned, so that a sum beyond int32 wraps as it does on the CPU
    if (job.inner % 4 == 0 && packed_well<int8_t, 4>(job.a) && packed_well<int8_t, 4>(job.b)) {
        const int *a_words = reinterpret_cast<const int*>(a), *b_words = reinterpret_cast<const int*>(b);
        for (int64_t k = lane(); k < job.inner / 4; k += warp_size)
            sum += static_cast<unsigned>(__dp4a(__ldg(a_words + k), __ldg(b_words + k), 0));
    } else {
        for (int64_t k = lane(); k < job.inner; k += warp_size) sum += static_cast<unsigned>(a[k] * b[k]);
    }
    for (int step = warp_size / 2; step > 0; step /= 2) sum += __shfl_xor_sync(whole_warp, sum, step);
    if (lane() == 0) job.sums[row * job.columns + column] = static_cast<int32_t>(sum);
}

}  // namespace
OPTIM8_END

void optim8::cuda_int8_rows(const Int8QuantizeJob& job, cudaStream_t stream) {
    constexpr const char* who = "int8_vectorwise_quant";
    if (job.outliers != nullptr && job.columns > 0)
        check_cuda(who, cudaMemsetAsync(job.outliers, 0, static_cast<size_t>(job.columns), stream));
    with_storage(job.storage, [&](auto stored) {
        using T = typename decltype(stored)::type;
        if (job.outliers != nullptr) launch(who, mark_outliers<T>, row_tiles(job.rows, job.columns), stream, job);
        launch(who, quantize_rows<T>, job.rows, stream, job);
    });
}

void optim8::cuda_int8_columns(const Int8ColumnsJob& job, cudaStream_t stream) {
    constexpr const char* who = "int8_double_quant";
    if (job.columns == 0) return;
    check_cuda(who, cudaMemsetAsync(job.stats, 0, static_cast<size_t>(job.columns) * sizeof(float), stream));
    const int64_t warps = column_strips(job.rows, job.columns);
    with_storage(job.storage, [&](auto stored) {
        using T = typename decltype(stored)::type;
        launch(who, column_maxima<T>, warps, stream, job);
        launch(who, quantize_columns<T>, warps, stream, job);
    });
}

void optim8::cuda_int8_dequantize(const Int8DequantizeJob& job, cudaStream_t stream) {
    launch("int8_vectorwise_dequant", dequantize_rows, row_tiles(job.rows, job.columns), stream, job);
}

void optim8::cuda_int8_scale(const Int8ScaleJob& job, cudaStream_t stream) {
    with_storage(job.storage, [&](auto stored) {
        launch("int8_mm_dequant", scale_rows<typename decltype(stored)::type>, row_tiles(job.rows, job.columns), stream,
               job);
    });
}

void optim8::cuda_int8_product(const Int8ProductJob& job, cudaStream_t stream) {
    launch("int8_linear_matmul", multiply, job.rows * job.columns, stream, job);
}
