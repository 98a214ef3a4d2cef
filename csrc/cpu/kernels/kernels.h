// The kernels that every instruction set offers, each a function over a range of work items. One list: the table of
// functions, its declaration for each set and the dispatch expand it.
#pragma once

#include "core/number.h"
#include "core/row.h"
#include "cpu/kernels/kernels_functional.h"

namespace optim8 {

// Codes of quotients, for checking the codec over every float32.
struct EncodeJob {
    const float* quotients;
    uint8_t* codes;
    int64_t size;
    CodeKind kind;
};

// One state as a step stores it, with dithered rounding or in 16 bits; for conversions, for the monitor and for
// checking the codec.
struct KeepJob {
    const float* values;
    uint8_t* codes;
    uint8_t* low;           // the low bytes of state in 16 bits, or null
    float* absmax;          // one for each block of step_block values
    const int32_t* blocks;  // their numbers in the whole parameter
    int64_t size;
    double step;
    int state;  // its place in the rule
    bool with_sign;
    Rounding rounding;  // in 16 bits
};

// The values of state in 16 bits.
struct RestoreJob {
    const uint8_t *codes, *low;
    const float* absmax;
    float* out;
    int64_t size;
    bool with_sign;
};

// An operation of core/number.h over arrays, for checking that every instruction set gives the same.
struct NumberJob {
    NumberOperation operation;
    const float *a, *b, *c;
    float* out;
    int64_t size;
};

}  // namespace optim8

// X(name, job type): void name(const job&, first item, one past the last item).
//   step_blocks, measure_blocks, quantize_blocks, dequantize_blocks, keep_blocks, restore_blocks: items are blocks.
//   encode_blocks, number_blocks: items are runs of 256 values.
#define OPTIM8_KERNELS(X) \
    X(step_blocks, Row) \
    X(measure_blocks, Row) \
    X(quantize_blocks, QuantizeJob) \
    X(dequantize_blocks, DequantizeJob) \
    X(encode_blocks, EncodeJob) \
    X(keep_blocks, KeepJob) \
    X(restore_blocks, RestoreJob) \
    X(number_blocks, NumberJob) \
    OPTIM8_FUNCTIONAL_KERNELS(X)
