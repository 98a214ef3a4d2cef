// Arguments of the functional API, checked and made into the jobs of core/jobs.h; for CPU and CUDA the same.
#pragma once

#include "core/codec.h"
#include "core/jobs.h"
#include "core/scalar.h"
#include "tensors/arguments.h"

#include <string>

namespace optim8 {

inline int64_t bytes_of(int64_t values, Storage storage) { return values * (storage == Storage::Float32 ? 4 : 2); }

// A job without midpoints, with a code of any kind: CPU and CUDA find these in different places. `blocksize` is
// positive.
inline QuantizeJob quantize_blockwise_job(const Arguments& check, py::handle A, py::handle code, int64_t blocksize,
                                          py::handle out, py::handle absmax) {
    const View values = check.floats("A", A);
    const View table = check.float32("code", code, code_size);
    const View codes = check.uint8("out", out, values.size);
    const View scales = check.float32("absmax", absmax, blocks_of(values.size, blocksize));
    return {values.data,
            static_cast<uint8_t*>(codes.data),
            static_cast<float*>(scales.data),
            static_cast<const float*>(table.data),
            nullptr,
            values.size,
            blocksize,
            values.storage(),
            CodeKind::Any};
}

// With a code of any kind. `blocksize` is positive.
inline DequantizeJob dequantize_blockwise_job(const Arguments& check, py::handle A, py::handle absmax, py::handle code,
                                              int64_t blocksize, py::handle out) {
    const View values = check.floats("out", out);
    const View codes = check.uint8("A", A, values.size);
    const View scales = check.float32("absmax", absmax, blocks_of(values.size, blocksize));
    const View table = check.float32("code", code, code_size);
    return {static_cast<const uint8_t*>(codes.data),
            static_cast<const float*>(scales.data),
            static_cast<const float*>(table.data),
            values.data,
            values.size,
            blocksize,
            values.storage(),
            CodeKind::Any};
}

inline Fourbit read_type(const Arguments& check, const std::string& quant_type) {
    if (quant_type == "nf4") return Fourbit::NF4;
    if (quant_type == "fp4") return Fourbit::FP4;
    check.fail("quant_type must be 'nf4' or 'fp4', got '" + quant_type + "'.");
}

inline int64_t halves(int64_t size) { return size / 2 + size % 2; }

inline Quantize4Job quantize_4bit_job(const Arguments& check, py::handle A, const std::string& quant_type,
                                      int64_t blocksize, py::handle out, py::handle absmax) {
    const Fourbit type = read_type(check, quant_type);
    check.blocksize(blocksize, 32);
    const View values = check.floats("A", A);
    const View packed = check.uint8("out", out, halves(values.size));
    const View scales = check.float32("absmax", absmax, blocks_of(values.size, blocksize));
    return {values.data,
            static_cast<uint8_t*>(packed.data),
            static_cast<float*>(scales.data),
            values.size,
            blocksize,
            values.storage(),
            type};
}

// Without the table of the code, which CPU and CUDA find in different places.
inline Dequantize4Job dequantize_4bit_job(const Arguments& check, py::handle A, py::handle absmax, int64_t blocksize,
                                          py::handle out) {
    check.blocksize(blocksize, 32);
    const View values = check.floats("out", out);
    const View packed = check.uint8("A", A, halves(values.size));
    const View scales = check.float32("absmax", absmax, blocks_of(values.size, blocksize));
    return {static_cast<const uint8_t*>(packed.data),
            static_cast<const float*>(scales.data),
            nullptr,
            values.data,
            values.size,
            blocksize,
            values.storage()};
}

// The tensors of a product of a 4-bit weight and a vector.
struct Gemv4Arguments {
    View vector, result, packed, scales, table;
};

inline Gemv4Arguments gemv_4bit_arguments(const Arguments& check, py::handle A, py::handle B, py::handle absmax,
                                          py::handle code, int64_t blocksize, py::handle out) {
    check.blocksize(blocksize, 32);
    const View vector = check.floats("A", A), result = check.floats("out", out);
    int64_t weights = 0;
    if (__builtin_mul_overflow(vector.size, result.size, &weights)) check.fail("the weight has too many values.");
    return {vector, result, check.uint8("B", B, halves(weights)),
            check.float32("absmax", absmax, blocks_of(weights, blocksize)), check.float32("code", code, fourbit_size)};
}

inline Int8QuantizeJob int8_rows_job(const Arguments& check, py::handle A, float threshold, py::handle out,
                                     py::handle stats, py::handle outliers) {
    const View values = check.floats("A", A);
    const Rows shape(values);
    const View codes = check.sized("out", check.int8("out", out), values.size);
    const View scales = check.float32("stats", stats, shape.rows);
    uint8_t* flags = nullptr;
    if (!outliers.is_none()) {
        if (!(threshold > 0.0f)) check.fail("threshold must be positive with outliers.");
        flags = static_cast<uint8_t*>(check.uint8("outliers", outliers, shape.columns).data);
    }
    return {values.data,
            static_cast<int8_t*>(codes.data),
            static_cast<float*>(scales.data),
            flags,
            shape.rows,
            shape.columns,
            outliers.is_none() ? float_of(inf_bits) : threshold,
            values.storage()};
}

// threshold 0 means none.
inline Int8ColumnsJob int8_columns_job(const Arguments& check, py::handle A, float threshold, py::handle out,
                                       py::handle stats) {
    const View values = check.floats("A", A);
    const Rows shape(values);
    const View codes = check.sized("out", check.int8("out", out), values.size);
    const View scales = check.float32("stats", stats, shape.columns);
    return {values.data,
            static_cast<int8_t*>(codes.data),
            static_cast<float*>(scales.data),
            shape.rows,
            shape.columns,
            threshold > 0.0f ? threshold : float_of(inf_bits),
            values.storage()};
}

inline Int8DequantizeJob int8_dequantize_job(const Arguments& check, py::handle A, py::handle stats, py::handle out) {
    const View codes = check.int8("A", A);
    const Rows shape(codes);
    const View scales = check.float32("stats", stats, shape.rows);
    const View values = check.float32("out", out, codes.size);
    return {static_cast<const int8_t*>(codes.data), static_cast<const float*>(scales.data),
            static_cast<float*>(values.data), shape.rows, shape.columns};
}

inline Int8ScaleJob int8_scale_job(const Arguments& check, py::handle A, py::handle row_stats, py::handle col_stats,
                                   py::handle bias, py::handle out) {
    const View sums = check.int32("A", A);
    const Rows shape(sums);
    const View rows = check.float32("row_stats", row_stats, shape.rows);
    const View columns = check.float32("col_stats", col_stats, shape.columns);
    const float* added = nullptr;
    if (!bias.is_none()) added = static_cast<const float*>(check.float32("bias", bias, shape.columns).data);
    const View values = check.sized("out", check.floats("out", out), sums.size);
    return {static_cast<const int32_t*>(sums.data),
            static_cast<const float*>(rows.data),
            static_cast<const float*>(columns.data),
            added,
            values.data,
            shape.rows,
            shape.columns,
            values.storage()};
}

inline Int8ProductJob int8_product_job(const Arguments& check, py::handle A, py::handle B, py::handle out) {
    const View a = check.int8("A", A), b = check.int8("B", B);
    const Rows left(a), right(b);
    if (left.columns != right.columns)
        check.fail("A and B must have the same number of columns, got " + a.describe() + " and " + b.describe() + ".");
    const View sums = check.sized("out", check.int32("out", out), left.rows * right.rows);
    return {static_cast<const int8_t*>(a.data),
            static_cast<const int8_t*>(b.data),
            static_cast<int32_t*>(sums.data),
            left.rows,
            right.rows,
            left.columns};
}

}  // namespace optim8
