// 4-bit quantization, its inverse, and the product of a packed weight with a vector.
#include "cpu/kernels/blocks.h"
#include "cpu/kernels/kernels_functional.h"
#include "cpu/kernels/nibbles.h"

#include <algorithm>

OPTIM8_BEGIN
namespace {

// Quotients of one block, each in [-1, 1]; gives its absmax.
template <class T>
float normalize_block(const T* values, int64_t n, float* quotients) {
    const uint32_t largest = largest_bits(values, n);
    const bool finite = largest < inf_bits;
    const float absmax = float_of(finite ? largest : largest_bits_below(values, n, inf_bits));
    const Normalizer normal = normalizer(absmax);
    int64_t i = 0;
    if (finite)
        for (; i + width <= n; i += width)
            store(quotients + i, clamp_unit(load(values + i) * F(normal.scale) * F(normal.reciprocal)));
    for (; i < n; ++i) quotients[i] = fourbit_quotient(to_float(values[i]) * normal.scale, normal.reciprocal);
    return absmax;
}

template <Fourbit type, class T>
void quantize_span(const Quantize4Job& job, int64_t begin, int64_t end) {
    alignas(64) float quotients[fourbit_span];
    const int64_t size = end - begin, whole = size / group * group;
    for (int64_t at = 0; at < size; at += job.blocksize) {
        const T* values = static_cast<const T*>(job.values) + begin + at;
        const int64_t n = std::min(job.blocksize, size - at);
        job.absmax[(begin + at) / job.blocksize] = normalize_block(values, n, quotients + at);
    }
    uint8_t* packed = job.packed + begin / 2;
    for (int64_t at = 0; at < whole; at += group) encode_nibbles<type>(quotients + at, packed + at / 2);
    if (whole < size) {
        const Padded<float> rest(quotients + whole, size - whole);
        uint8_t out[group / 2];
        encode_nibbles<type>(rest.values, out);
        std::memcpy(packed + whole / 2, out, static_cast<size_t>((size - whole + 1) / 2));
    }
}

template <Fourbit type>
void quantize_storage(const Quantize4Job& job, int64_t begin, int64_t end) {
    with_storage(job.storage,
                 [&](auto stored) { quantize_span<type, typename decltype(stored)::type>(job, begin, end); });
}

template <class T>
void dequantize_span(const Dequantize4Job& job, int64_t begin, int64_t end) {
    T* out = static_cast<T*>(job.out);
    for (int64_t at = begin; at < end;) {
        const int64_t block = at / job.blocksize, stop = std::min(end, (block + 1) * job.blocksize);
        // 16 products serve the whole block: table value times absmax in float32, rounded once to the storage type.
        T table[fourbit_size];
        for (int c = 0; c < fourbit_size; c += width) store(table + c, load(job.table + c) * F(job.absmax[block]));
        for (; at + group <= stop; at += group) decode_nibbles(job.packed + at / 2, table, out + at);
        for (; at < stop; at += 2) {
            const uint8_t pair = job.packed[at / 2];
            out[at] = table[pair >> 4];
            if (at + 1 < stop) out[at + 1] = table[pair & 15];
        }
        at = stop;
    }
}

// The sum of 16 lanes in a fixed order, the same for every instruction set.
float sum_lanes(float (&lane)[gemv_lanes]) {
    for (int half = gemv_lanes / 2; half > 0; half /= 2)
        for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
    return lane[0];
}

constexpr int vectors = gemv_lanes / width;

// Bytes to prefetch ahead: rows are short beside what the hardware's own prefetching needs to start.
constexpr int64_t gemv_ahead = 16 << 10;

// One group of one row: the lane's eight products in order, then one multiplication by the lane's absmax.
template <int turn>
OPTIM8_HD void add_products(const NibbleTable& table, U words, const float* vector, F& sum) {
    if constexpr (turn < 8) {
        sum = fma(table.at<turn>(words), load(vector + turn * gemv_lanes), sum);
        add_products<turn + 1>(table, words, vector, sum);
    }
}

// `together` rows that have whole groups of columns; `scales` blocks to a group, or one block to many groups.
template <int together, int scales>
void gemv_rows(const Gemv4Job& job, int64_t row, float (&out)[together]) {
    const NibbleTable table(job.table);
    F sum[together][vectors];
    for (auto& of_row : sum)
        for (F& s : of_row) s = F(0.0f);
    for (int64_t k = 0; k < job.columns; k += gemv_group) {
        for (int v = 0; v < vectors; ++v) {
            const float* vector = job.vector + k + v * width;
            F products[together];
            for (int r = 0; r < together; ++r) {
                const uint8_t* packed = job.packed + ((row + r) * job.columns + k) / 2 + 4 * v * width;
                __builtin_prefetch(packed + gemv_ahead);  // past the end this does nothing
                products[r] = F(0.0f);
                add_products<0>(table, load_words(packed), vector, products[r]);
            }
            for (int r = 0; r < together; ++r) {
                const float* absmax = job.absmax + ((row + r) * job.columns + k) / job.blocksize;
                __builtin_prefetch(absmax + 2 * gemv_ahead / job.blocksize);
                sum[r][v] = fma(products[r], spread_scales<scales>(absmax, v * width), sum[r][v]);
            }
        }
    }
    for (int r = 0; r < together; ++r) {
        alignas(64) float lane[gemv_lanes];
        for (int v = 0; v < vectors; ++v) store(lane + v * width, sum[r][v]);
        out[r] = sum_lanes(lane);
    }
}

template <int scales, class T>
void gemv_whole_groups(const Gemv4Job& job, int64_t begin, int64_t end) {
    constexpr int together = 4;
    T* out = static_cast<T*>(job.out);
    int64_t row = begin;
    for (; row + together <= end; row += together) {
        float sums[together];
        gemv_rows<together, scales>(job, row, sums);
        for (int r = 0; r < together; ++r) out[row + r] = from_float<T>(sums[r]);
    }
    for (; row < end; ++row) {
        float sum[1];
        gemv_rows<1, scales>(job, row, sum);
        out[row] = from_float<T>(sum[0]);
    }
}

// Rows of any length, which may begin within a byte and within a block.
template <class T>
void gemv_any(const Gemv4Job& job, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        float lane[gemv_lanes] = {};
        for (int64_t k = 0; k < job.columns; ++k) {
            const int64_t i = row * job.columns + k;
            const int code = job.packed[i / 2] >> (i % 2 == 0 ? 4 : 0) & 15;
            const float weight = job.table[code] * job.absmax[i / job.blocksize];
            lane[k % gemv_lanes] = fma(weight, job.vector[k], lane[k % gemv_lanes]);
        }
        static_cast<T*>(job.out)[row] = from_float<T>(sum_lanes(lane));
    }
}

template <class T>
void gemv_storage(const Gemv4Job& job, int64_t begin, int64_t end) {
    if (!job.whole_groups) return gemv_any<T>(job, begin, end);
    if (job.blocksize == 32) return gemv_whole_groups<4, T>(job, begin, end);
    if (job.blocksize == 64) return gemv_whole_groups<2, T>(job, begin, end);
    return gemv_whole_groups<1, T>(job, begin, end);
}

}  // namespace

void quantize_4bit(const Quantize4Job& job, int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
        const int64_t from = s * fourbit_span, to = std::min(job.size, from + fourbit_span);
        if (job.type == Fourbit::NF4)
            quantize_storage<Fourbit::NF4>(job, from, to);
        else
            quantize_storage<Fourbit::FP4>(job, from, to);
    }
}

void dequantize_4bit(const Dequantize4Job& job, int64_t begin, int64_t end) {
    const int64_t from = begin * fourbit_span, to = std::min(job.size, end * fourbit_span);
    with_storage(job.storage, [&](auto stored) { dequantize_span<typename decltype(stored)::type>(job, from, to); });
}

void gemv_4bit(const Gemv4Job& job, int64_t begin, int64_t end) {
    with_storage(job.storage, [&](auto stored) { gemv_storage<typename decltype(stored)::type>(job, begin, end); });
}

OPTIM8_END
