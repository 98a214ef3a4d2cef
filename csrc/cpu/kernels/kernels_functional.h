// The 4-bit and int8 kernels of the functional API, and the jobs that only the CPU has; the list is part of
// OPTIM8_KERNELS (kernels.h).
#pragma once

#include "core/jobs.h"

namespace optim8 {

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
