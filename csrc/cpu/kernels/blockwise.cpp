// Blockwise quantization of values to 8-bit codes and back: the functional API's kernels. The dynamic code takes the
// closed form; any other table of 256 sorted values is searched.
#include "cpu/kernels/blocks.h"
#include "cpu/kernels/kernels.h"

#include <algorithm>
#include <cstring>

OPTIM8_BEGIN
namespace {

constexpr int lanes = code_group / width;

constexpr Code code_of(CodeKind kind) {
    return kind == CodeKind::Signed ? Code::Signed : kind == CodeKind::Unsigned ? Code::Unsigned : Code::Positive;
}

template <CodeKind kind>
OPTIM8_HD uint8_t encode_one(float x, float reciprocal, const float* middle) {
    if constexpr (kind != CodeKind::Any) {
        return encode<code_of(kind)>(x, reciprocal, Tables<code_of(kind)>::all);
    } else {
        return search(x * reciprocal, middle);
    }
}

// A block with NaN or infinity in it: NaN is stored as 0 is, an infinity as the last code of its sign.
template <CodeKind kind, class T>
void encode_checked(const T* values, int64_t n, Normalizer normal, const float* middle, uint8_t* codes) {
    for (int64_t i = 0; i < n; ++i) {
        const float x = to_float(values[i]);
        if (magnitude_bits(x) == inf_bits) {
            codes[i] = x > 0.0f ? code_size - 1 : 0;
        } else {
            const float finite = magnitude_bits(x) > inf_bits ? 0.0f : x * normal.scale;
            codes[i] = encode_one<kind>(finite, normal.reciprocal, middle);
        }
    }
}

template <CodeKind kind, class T>
OPTIM8_HD void encode_values(const T* values, float scale, float reciprocal, const float* middle, uint8_t* codes) {
    if constexpr (kind == CodeKind::Any) {
        for (int i = 0; i < code_group; ++i) codes[i] = search(to_float(values[i]) * scale * reciprocal, middle);
    } else {
        F x[lanes];
        load_vectors(values, x);
        for (F& vector : x) vector = vector * F(scale);
        encode_group<code_of(kind)>(x, reciprocal, codes);
    }
}

template <CodeKind kind, class T>
void quantize_block(const T* values, int64_t n, const float* middle, uint8_t* codes, float* absmax) {
    uint32_t largest = largest_bits(values, n);
    const bool finite = largest < inf_bits;
    if (!finite) largest = largest_bits_below(values, n, inf_bits);
    *absmax = float_of(largest);
    const Normalizer normal = normalizer(*absmax);
    if (!finite) return encode_checked<kind>(values, n, normal, middle, codes);
    int64_t i = 0;
    for (; i + code_group <= n; i += code_group)
        encode_values<kind>(values + i, normal.scale, normal.reciprocal, middle, codes + i);
    if (i < n) {
        const Padded<T> rest(values + i, n - i);
        uint8_t out[code_group];
        encode_values<kind>(rest.values, normal.scale, normal.reciprocal, middle, out);
        std::memcpy(codes + i, out, static_cast<size_t>(n - i));
    }
}

template <CodeKind kind, class T>
void quantize_range(const QuantizeJob& job, int64_t begin, int64_t end) {
    const T* values = static_cast<const T*>(job.values);
    for (int64_t b = begin; b < end; ++b) {
        const int64_t at = b * job.blocksize;
        quantize_block<kind>(values + at, std::min(job.blocksize, job.size - at), job.middle, job.codes + at,
                             job.absmax + b);
    }
}

template <class T>
void quantize_storage(const QuantizeJob& job, int64_t begin, int64_t end) {
    switch (job.kind) {
        case CodeKind::Signed:
            return quantize_range<CodeKind::Signed, T>(job, begin, end);
        case CodeKind::Unsigned:
            return quantize_range<CodeKind::Unsigned, T>(job, begin, end);
        case CodeKind::Positive:
            return quantize_range<CodeKind::Positive, T>(job, begin, end);
        case CodeKind::Any:
            return quantize_range<CodeKind::Any, T>(job, begin, end);
    }
}

template <CodeKind kind, class T>
OPTIM8_HD void decode_values(const uint8_t* codes, float absmax, const float* code, T* out) {
    if constexpr (kind == CodeKind::Any) {
        for (int i = 0; i < code_group; ++i) out[i] = from_float<T>(code[codes[i]] * absmax);
    } else {
        F x[lanes];
        decode_group<code_of(kind)>(codes, x);
        for (F& vector : x) vector = vector * F(absmax);
        store_vectors(out, x);
    }
}

template <CodeKind kind, class T>
void dequantize_range(const DequantizeJob& job, int64_t begin, int64_t end) {
    T* values = static_cast<T*>(job.out);
    // As far as a compiler knows, what is written may be the job.
    const uint8_t* codes = job.codes;
    const float* code = job.code;
    for (int64_t b = begin; b < end; ++b) {
        const int64_t stop = std::min((b + 1) * job.blocksize, job.size);
        const float absmax = job.absmax[b];
        int64_t i = b * job.blocksize;
        for (; i + code_group <= stop; i += code_group) decode_values<kind>(codes + i, absmax, code, values + i);
        if (i < stop) {
            const Padded<uint8_t> rest(codes + i, stop - i);
            T out[code_group];
            decode_values<kind>(rest.values, absmax, code, out);
            std::memcpy(values + i, out, static_cast<size_t>(stop - i) * sizeof(T));
        }
    }
}

template <class T>
void dequantize_storage(const DequantizeJob& job, int64_t begin, int64_t end) {
    switch (job.kind) {
        case CodeKind::Signed:
            return dequantize_range<CodeKind::Signed, T>(job, begin, end);
        case CodeKind::Unsigned:
        case CodeKind::Positive:
            return dequantize_range<CodeKind::Unsigned, T>(job, begin, end);
        case CodeKind::Any:
            return dequantize_range<CodeKind::Any, T>(job, begin, end);
    }
}

}  // namespace

void quantize_blocks(const QuantizeJob& job, int64_t begin, int64_t end) {
    with_storage(job.storage, [&](auto stored) { quantize_storage<typename decltype(stored)::type>(job, begin, end); });
}

void dequantize_blocks(const DequantizeJob& job, int64_t begin, int64_t end) {
    with_storage(job.storage,
                 [&](auto stored) { dequantize_storage<typename decltype(stored)::type>(job, begin, end); });
}

namespace {

template <Code code, int state>
void keep_block(const KeepJob& job, int64_t b) {
    const int64_t at = b * step_block, n = std::min<int64_t>(step_block, job.size - at);
    alignas(64) float x[step_block] = {};
    uint8_t codes[step_block], low[step_block];
    std::memcpy(x, job.values + at, static_cast<size_t>(n) * sizeof(float));
    const BlockScale by = block_scale<code, Rounding::Dithered>(float_of(largest_bits(x, step_block)));
    const uint32_t start = dither_start(static_cast<uint32_t>(job.blocks[b]), dither_time(job.step));
    for (int i = 0; i < step_block; i += code_group) {
        F of_group[code_group / width];
        for (int j = 0; j < code_group / width; ++j) of_group[j] = load(x + i + j * width) * F(by.normal.scale);
        const float reciprocal = by.normal.reciprocal;
        if (job.low == nullptr)
            encode_group_dithered<code, state>(of_group, reciprocal, start, i, codes + i);
        else if (job.rounding == Rounding::Dithered)
            encode16_group<code, state, Rounding::Dithered>(of_group, reciprocal, start, i, codes + i, low + i);
        else
            encode16_group<code, state, Rounding::Nearest>(of_group, reciprocal, start, i, codes + i, low + i);
    }
    std::memcpy(job.codes + at, codes, static_cast<size_t>(n));
    if (job.low != nullptr) std::memcpy(job.low + at, low, static_cast<size_t>(n));
    job.absmax[b] = by.absmax;
}

template <Code code>
void restore_block(const RestoreJob& job, int64_t b) {
    const int64_t at = b * step_block, n = std::min<int64_t>(step_block, job.size - at);
    uint8_t codes[step_block] = {}, low[step_block] = {};
    alignas(64) float x[step_block];
    std::memcpy(codes, job.codes + at, static_cast<size_t>(n));
    std::memcpy(low, job.low + at, static_cast<size_t>(n));
    for (int i = 0; i < step_block; i += code_group) {
        F of_group[code_group / width];
        decode16_group<code>(codes + i, low + i, of_group);
        for (int j = 0; j < code_group / width; ++j) store(x + i + j * width, of_group[j] * F(job.absmax[b]));
    }
    std::memcpy(job.out + at, x, static_cast<size_t>(n) * sizeof(float));
}

}  // namespace

void keep_blocks(const KeepJob& job, int64_t begin, int64_t end) {
    static_assert(max_states == 3, "a case for each");
    for (int64_t b = begin; b < end; ++b) switch (job.state) {
            case 0:
                job.with_sign ? keep_block<Code::Signed, 0>(job, b) : keep_block<Code::Positive, 0>(job, b);
                break;
            case 1:
                job.with_sign ? keep_block<Code::Signed, 1>(job, b) : keep_block<Code::Positive, 1>(job, b);
                break;
            default:
                job.with_sign ? keep_block<Code::Signed, 2>(job, b) : keep_block<Code::Positive, 2>(job, b);
        }
}

void restore_blocks(const RestoreJob& job, int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
        job.with_sign ? restore_block<Code::Signed>(job, b) : restore_block<Code::Positive>(job, b);
}

void encode_blocks(const EncodeJob& job, int64_t begin, int64_t end) {
    const int64_t stop = std::min(end * step_block, job.size);
    for (int64_t at = begin * step_block; at < stop; at += code_group) {
        const int64_t n = std::min<int64_t>(code_group, stop - at);
        const Padded<float> quotients(job.quotients + at, n);
        uint8_t codes[code_group];
        if (job.kind == CodeKind::Signed)
            encode_values<CodeKind::Signed>(quotients.values, 1.0f, 1.0f, nullptr, codes);
        else
            encode_values<CodeKind::Unsigned>(quotients.values, 1.0f, 1.0f, nullptr, codes);
        std::memcpy(job.codes + at, codes, static_cast<size_t>(n));
    }
}

OPTIM8_END
