// What a kernel of the functional API is asked to do: addresses, sizes and kinds. CPU and CUDA take the same jobs; the
// addresses are of the device that runs them.
#pragma once

#include "core/fourbit.h"
#include "core/row.h"

namespace optim8 {

// The codes of core/codec.h, or any table of 256 sorted values.
enum class CodeKind : uint8_t { Signed, Unsigned, Positive, Any };

struct QuantizeJob {
    const void* values;
    uint8_t* codes;
    float* absmax;        // one for each block
    const float* code;    // 256 sorted values
    const float* middle;  // the 255 midpoints between them
    int64_t size, blocksize;
    Storage storage;
    CodeKind kind;
};

struct DequantizeJob {
    const uint8_t* codes;
    const float* absmax;
    const float* code;
    void* out;
    int64_t size, blocksize;
    Storage storage;
    CodeKind kind;
};

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
