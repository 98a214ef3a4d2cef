// The jobs of the 4-bit and int8 kernels of the functional API; the list is part of OPTIM8_KERNELS (cpu/kernels.h).
#pragma once

#include "core/fourbit.h"
#include "core/row.h"

namespace optim8 {

struct Quantize4Job {
    const void* values;
    uint8_t* packed;  // two codes a byte, the first value in the high nibble
    float* absmax;    // one for each block
    int64_t size, blocksize;
    Storage storage;
    Fourbit type;
};

struct Dequantize4Job {
    const uint8_t* packed;
    const float* absmax;
    const float* table;  // the 16 values of the code
    void* out;
    int64_t size, blocksize;
    Storage storage;
};

// Values that a thread takes at a time: whole blocks of every block size, whole bytes of codes.
constexpr int64_t fourbit_span = 4096;

// out[r] = sum over k of weight[r, k] * vector[k], weight packed row after row.
struct Gemv4Job {
    const float* vector;  // columns values; where `whole_groups` holds, in the order of gemv_order
    const uint8_t* packed;
    const float* absmax;
    const float* table;  // the 16 values of the code
    void* out;           // rows values
    int64_t rows, columns, blocksize;
    Storage storage;    // of out
    bool whole_groups;  // columns are a multiple of gemv_group
};

// Columns that the packed product takes at a time: 16 lanes of 8 codes.
constexpr int64_t gemv_group = 128;
// Where in its group the value stands that meets nibble `turn` (0 to 7, lowest bits first) of 32-bit lane `lane`.
constexpr int64_t gemv_order(int64_t turn, int64_t lane) { return 8 * lane + (turn ^ 1); }

// Rows of values to int8: round(127 x / absmax of the row), ties to even.
struct Int8QuantizeJob {
    const void* values;
    int8_t* codes;
    float* stats;       // one for each row
    uint8_t* outliers;  // one for each column: 1 where an entry reaches the threshold; null without a threshold
    int64_t rows, columns;
    float threshold;  // infinity without one
    Storage storage;
};

// The same down the columns; entries that reach the threshold are left out and stored as 0.
struct Int8ColumnsJob {
    const void* values;
    int8_t* codes;
    float* stats;  // one for each column
    int64_t rows, columns;
    float threshold;
    Storage storage;
};

struct Int8DequantizeJob {
    const int8_t* codes;
    const float* stats;
    float* out;
    int64_t rows, columns;
};

// out = sums * row * column / 127^2 + bias.
struct Int8ScaleJob {
    const int32_t* sums;
    const float* row_stats;
    const float* column_stats;
    const float* bias;  // one for each column, or null
    void* out;
    int64_t rows, columns;
    Storage storage;
};

// sums = a times the transpose of b, row by row of a.
struct Int8ProductJob {
    const int8_t* a;
    const int8_t* b;
    int32_t* sums;
    int64_t rows, columns, inner;
};

}  // namespace optim8

// X(name, job type): void name(const job&, first item, one past the last item).
//   quantize_4bit, dequantize_4bit: items are spans of fourbit_span values.   gemv_4bit: rows.
//   int8_rows, int8_outliers, int8_dequantize, int8_scale, int8_product: rows.   int8_columns: groups of 64 columns.
#define OPTIM8_FUNCTIONAL_KERNELS(X) \
    X(quantize_4bit, Quantize4Job) \
    X(dequantize_4bit, Dequantize4Job) \
    X(gemv_4bit, Gemv4Job) \
    X(int8_outliers, Int8QuantizeJob) \
    X(int8_rows, Int8QuantizeJob) \
    X(int8_columns, Int8ColumnsJob) \
    X(int8_dequantize, Int8DequantizeJob) \
    X(int8_scale, Int8ScaleJob) \
    X(int8_product, Int8ProductJob)
