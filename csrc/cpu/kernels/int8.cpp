// LLM.int8(): rows and columns to int8, back, and the scaling of an integer product. The arithmetic is float64 in
// plain loops, which compilers vectorize for every instruction set with the same results.
#include "core/int8.h"
#include "cpu/kernels/blocks.h"
#include "cpu/kernels/kernels_functional.h"

#include <algorithm>
#include <type_traits>

OPTIM8_BEGIN
namespace {

constexpr int lanes = group / width;

template <class T>
void narrow(const float (&from)[group], int64_t n, T* to) {
    if (n == group) {
        F x[lanes];
        load_vectors(from, x);
        store_vectors(to, x);
    } else {
        for (int64_t i = 0; i < n; ++i) to[i] = from_float<T>(from[i]);
    }
}

// Finite values, the zeros after the last of them included.
void encode_finite(const float (&x)[group], double factor, bool quick, int8_t (&out)[group]) {
    if (quick) {
        const float narrow_factor = static_cast<float>(factor);
        uint32_t farthest = 0;
        for (int i = 0; i < group; ++i) {
            const QuickInt8 code = encode_int8_quickly(x[i], narrow_factor);
            out[i] = static_cast<int8_t>(code.bits & 255);
            farthest = maximum(farthest, bits_of(code.distance));
        }
        if (farthest < bits_of(int8_sure)) return;
    }
    for (int i = 0; i < group; ++i) out[i] = encode_int8(x[i], factor);
}

template <class T>
void mark_outliers(const Int8QuantizeJob& job, int64_t row) {
    const T* values = static_cast<const T*>(job.values) + row * job.columns;
    if (largest_bits(values, job.columns) < bits_of(job.threshold)) return;
    const uint32_t limit = bits_of(job.threshold);
    for (int64_t at = 0; at < job.columns; at += group) {
        const int64_t n = std::min<int64_t>(group, job.columns - at);
        float x[group] = {};
        widen(values + at, n, x);
        uint32_t any = 0;
        for (const float value : x) any |= static_cast<uint32_t>(magnitude_bits(value) >= limit);
        if (any == 0) continue;
        for (int64_t i = 0; i < n; ++i) {
            const uint32_t magnitude = magnitude_bits(x[i]);
            // Several threads may mark a column at the same time. A NaN reaches no threshold.
            if (magnitude >= limit && magnitude <= inf_bits)
                __atomic_store_n(job.outliers + at + i, 1, __ATOMIC_RELAXED);
        }
    }
}

template <class T>
void quantize_row(const Int8QuantizeJob& job, int64_t row) {
    const T* values = static_cast<const T*>(job.values) + row * job.columns;
    int8_t* codes = job.codes + row * job.columns;
    const uint32_t limit = bits_of(job.threshold);
    const uint32_t largest = largest_bits(values, job.columns);
    const bool finite = largest < inf_bits;
    const float absmax = float_of(largest < limit ? largest : largest_bits_below(values, job.columns, limit));
    const double factor = int8_factor(absmax);
    const bool quick = has_quick_int8(factor);
    job.stats[row] = absmax;
    for (int64_t at = 0; at < job.columns; at += group) {
        const int64_t n = std::min<int64_t>(group, job.columns - at);
        float x[group] = {};
        int8_t out[group];
        widen(values + at, n, x);
        if (job.outliers != nullptr)
            for (int64_t i = 0; i < n; ++i) x[i] = job.outliers[at + i] != 0 ? 0.0f : x[i];
        if (finite)
            encode_finite(x, factor, quick, out);
        else
            for (int i = 0; i < group; ++i) out[i] = encode_int8_checked(x[i], factor);
        std::memcpy(codes + at, out, static_cast<size_t>(n));
    }
}

template <class T>
void quantize_columns(const Int8ColumnsJob& job, int64_t begin) {
    const int64_t n = std::min<int64_t>(group, job.columns - begin);
    const T* values = static_cast<const T*>(job.values) + begin;
    const uint32_t limit = bits_of(job.threshold);
    uint32_t largest[group] = {};
    float x[group] = {};
    for (int64_t r = 0; r < job.rows; ++r) {
        widen(values + r * job.columns, n, x);
        for (int i = 0; i < group; ++i) {
            const uint32_t bits = magnitude_bits(x[i]);
            largest[i] = maximum(largest[i], bits < limit ? bits : 0u);
        }
    }
    double factor[group];
    for (int i = 0; i < group; ++i) factor[i] = int8_factor(float_of(largest[i]));
    for (int64_t i = 0; i < n; ++i) job.stats[begin + i] = float_of(largest[i]);
    const bool with_threshold = limit < inf_bits;
    for (int64_t r = 0; r < job.rows; ++r) {
        int8_t out[group];
        widen(values + r * job.columns, n, x);
        for (int i = 0; i < group; ++i) {
            const bool left_out = with_threshold && magnitude_bits(x[i]) >= limit;
            out[i] = encode_int8_checked(left_out ? 0.0f : x[i], factor[i]);
        }
        std::memcpy(job.codes + r * job.columns + begin, out, static_cast<size_t>(n));
    }
}

// `n` is a constant where a group is whole, or compilers keep its values in memory.
template <class T>
OPTIM8_HD void scale_group(const Int8ScaleJob& job, const int32_t* sums, double row_scale, int64_t at, int64_t n,
                           T* out) {
    float scaled[group];
    const float* columns = job.column_stats + at;
    if (job.bias == nullptr)
        for (int64_t i = 0; i < n; ++i) scaled[i] = scale_int8(sums[i], row_scale, columns[i], 0.0f);
    else
        for (int64_t i = 0; i < n; ++i) scaled[i] = scale_int8(sums[i], row_scale, columns[i], job.bias[at + i]);
    narrow(scaled, n, out);
}

template <class T>
void scale_row(const Int8ScaleJob& job, int64_t row) {
    const int32_t* sums = job.sums + row * job.columns;
    T* out = static_cast<T*>(job.out) + row * job.columns;
    const double row_scale = int8_row_scale(job.row_stats[row]);
    int64_t at = 0;
    for (; at + group <= job.columns; at += group) scale_group(job, sums + at, row_scale, at, group, out + at);
    if (at < job.columns) scale_group(job, sums + at, row_scale, at, job.columns - at, out + at);
}

}  // namespace

void int8_outliers(const Int8QuantizeJob& job, int64_t begin, int64_t end) {
    with_storage(job.storage, [&](auto stored) {
        for (int64_t row = begin; row < end; ++row) mark_outliers<typename decltype(stored)::type>(job, row);
    });
}

void int8_rows(const Int8QuantizeJob& job, int64_t begin, int64_t end) {
    with_storage(job.storage, [&](auto stored) {
        for (int64_t row = begin; row < end; ++row) quantize_row<typename decltype(stored)::type>(job, row);
    });
}

void int8_columns(const Int8ColumnsJob& job, int64_t begin, int64_t end) {
    with_storage(job.storage, [&](auto stored) {
        for (int64_t g = begin; g < end; ++g) quantize_columns<typename decltype(stored)::type>(job, g * group);
    });
}

void int8_dequantize(const Int8DequantizeJob& job, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const int64_t at = row * job.columns;
        for (int64_t c = 0; c < job.columns; ++c) job.out[at + c] = decode_int8(job.codes[at + c], job.stats[row]);
    }
}

void int8_scale(const Int8ScaleJob& job, int64_t begin, int64_t end) {
    with_storage(job.storage, [&](auto stored) {
        for (int64_t row = begin; row < end; ++row) scale_row<typename decltype(stored)::type>(job, row);
    });
}

void int8_product(const Int8ProductJob& job, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const int8_t* a = job.a + row * job.inner;
        for (int64_t column = 0; column < job.columns; ++column) {
            const int8_t* b = job.b + column * job.inner;
            // Unsigned, so that a sum beyond int32 wraps instead of being undefined.
            uint32_t sum = 0;
            for (int64_t k = 0; k < job.inner; ++k) sum += static_cast<uint32_t>(a[k] * b[k]);
            job.sums[row * job.columns + column] = static_cast<int32_t>(sum);
        }
    }
}

OPTIM8_END
