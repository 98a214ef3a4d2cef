// The dynamic 8-bit code (Dettmers 2015, arXiv 1511.04561; Dettmers et al. 2021, arXiv 2110.02861) in closed form.
//
// Seven decades, each split evenly: decade i covers 10^(i-6) * [0.1, 1] with n = first * 2^i values at the centres of n
// equal cells. `first` is 1 where one bit of the index is the sign, 2 where it is not. With 0 and 1 that makes 256.
// Within a decade the nearest value is a straight line and a truncation; so encoding is: find the decade, one
// fused multiply-add, one truncation, one minimum.
#pragma once

#include "core/scalar.h"

OPTIM8_BEGIN

constexpr int code_size = 256;
constexpr int decades = 7;
// Values of one optimizer block: one absmax for each run of this many values of a tensor.
constexpr int step_block = 256;

// The j-th point of an even grid over [0.1, 1] with n cells, as the published table rounds it: laid from both ends
// towards the middle, one float32 rounding a point (the product is exact in double, and so is the sum).
constexpr float grid_point(int j, int n) {
    const float step = (1.0f - 0.1f) / static_cast<float>(n);
    return 2 * j < n ? static_cast<float>(static_cast<double>(0.1f) + static_cast<double>(step) * j)
                     : static_cast<float>(1.0 - static_cast<double>(step) * (n - j));
}
constexpr float cell_centre(int j, int n) { return (grid_point(j, n) + grid_point(j + 1, n)) / 2; }

// The upper end of each decade, and its inverse.
constexpr double decade_scale[decades] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1e0};
constexpr double decade_inverse[decades] = {1e6, 1e5, 1e4, 1e3, 1e2, 1e1, 1e0};

// Signed: exp_avg, and the default of the functional API. Unsigned: a code for values that are not negative.
// Positive: Unsigned, except that a positive value never becomes code 0 but takes the smallest positive code; for
// exp_avg_sq, which would otherwise restart from nothing (an update up to 1/sqrt(1 - beta2) times too large).
enum class Code { Signed, Unsigned, Positive };

OPTIM8_HD constexpr bool is_signed(Code code) { return code == Code::Signed; }
OPTIM8_HD constexpr uint8_t zero_code_of(Code code) { return is_signed(code) ? 127 : 0; }

// The line of one decade: nearest index = min(trunc(slope * y + offset), last).
struct Line {
    float slope, offset;
    int32_t last;
};

// Everything about one code that is not a formula of one value, made at compile time.
struct CodeTables {
    float value[code_size];    // by index, as published
    float threshold[decades];  // smallest y of zone z + 1
    Line line[decades + 1];    // by zone: what rounds to 0 or to a value of decade 0, decades 1 to 6, what rounds to 1
    // The zone of y in [2^-31, 2) by the low five bits of its exponent: no binade holds more than one threshold, so
    // adding `carry` to the bits of y moves what lies above the threshold into the next binade, and there the zone
    // of a binade is that of its lower end.
    uint32_t carry[32];
    float slope[32], offset[32];
    int32_t last[32];
};

constexpr int exponent_field(double y) {
    int exponent = 127;
    for (; y < 1; y *= 2) --exponent;
    return exponent;
}

constexpr uint32_t mantissa_field(float y) {
    double scaled = y;
    while (scaled < 1) scaled *= 2;
    return static_cast<uint32_t>((scaled - 1) * (1 << 23));
}

constexpr CodeTables make_tables(Code code) {
    CodeTables t{};
    const bool with_sign = is_signed(code);
    const int first = with_sign ? 1 : 2;
    const int zero = zero_code_of(code);
    const int top = with_sign ? 128 : 255;  // the magnitude index of exactly 1
    const int shift = with_sign ? 0 : 1;    // cells are numbered from n, indices from n - shift

    t.value[zero] = 0.0f;
    t.value[code_size - 1] = 1.0f;
    for (int i = 0; i < decades; ++i) {
        const int n = first << i;
        for (int j = 0; j < n; ++j) {
            const float value = static_cast<float>(decade_scale[i]) * cell_centre(j, n);
            const int a = n - shift + j;
            t.value[zero + a] = value;
            if (with_sign) t.value[zero - a] = -value;
        }
        t.line[i] = Line{static_cast<float>(n * decade_inverse[i] / 0.9), static_cast<float>(n * 8 / 9.0 - shift),
                         2 * n - 1 - shift};
        // Between two decades: the mean of the last value of one and the first of the next; at the top, of the
        // last value and 1.
        t.threshold[i] = static_cast<float>(i + 1 < decades ? decade_scale[i] * (1 + 0.9 / n) : 1 - 0.225 / n);
    }

    t.line[decades] = Line{0.0f, static_cast<float>(top), top};
    // Decade 0 has one or two values; their line also gives 0 for what rounds to 0, so it goes through the boundary
    // between 0 and the first value, and that between the two. Where nothing becomes 0 it begins at index 1.
    const double from_zero = code == Code::Positive ? 0 : decade_scale[0] * (0.1 + 0.45 / first) / 2;
    const double to_second = first == 2 ? decade_scale[0] * 0.55 : 2 * from_zero;
    const double slope = 1 / (to_second - from_zero);
    t.line[0].slope = static_cast<float>(slope);
    t.line[0].offset = static_cast<float>(1 - from_zero * slope);

    int zone = 0;
    for (int binade = 96; binade < 128; ++binade) {
        const int b = binade & 31;
        const Line& line = t.line[zone];
        t.slope[b] = line.slope;
        t.offset[b] = line.offset;
        t.last[b] = line.last;
        if (zone < decades && exponent_field(t.threshold[zone]) == binade) {
            t.carry[b] = (1u << 23) - mantissa_field(t.threshold[zone]);
            ++zone;
        }
    }
    return t;
}

template <Code code>
struct Tables {
    static constexpr CodeTables all = make_tables(code);
};

// The formula itself, for any number type.
template <class F, class I>
OPTIM8_HD I nearest_on_line(F y, F slope, F offset, I last) {
    return minimum(truncate(fma(y, slope, offset)), last);
}

constexpr float smallest_quotient = 4.656612873e-10f;  // 2^-31

// The entry of a binade, by the low five bits of its exponent.
template <class T>
OPTIM8_HD T of_binade(const T (&table)[32], uint32_t exponent) {
    return table[exponent & 31];
}

// The smaller of two numbers that are neither NaN nor both zeros.
OPTIM8_HD float smaller(float a, float b) {
#if defined(__CUDA_ARCH__)
    return fminf(a, b);
#else
    return minimum(a, b);
#endif
}

// The index of the magnitude of a quotient y = x / absmax, |y| <= 1 up to rounding, before it is truncated. NaN gives
// that of 0. `T` is CodeTables, or what stands for it where the lanes of a warp hold the tables; so every look-up is
// made by every lane.
template <class T>
OPTIM8_HD float on_line(float y, const T& t) {
    const float clamped = maximum(y, smallest_quotient);
    const uint32_t bits = bits_of(clamped);
    const uint32_t zone = (bits + of_binade(t.carry, bits >> 23)) >> 23;
    return smaller(fma(clamped, of_binade(t.slope, zone), of_binade(t.offset, zone)),
                   static_cast<float>(of_binade(t.last, zone)));
}

// The code of x in a block whose absmax has the given reciprocal.
template <Code code, class T>
OPTIM8_HD uint8_t encode(float x, float reciprocal, const T& t) {
    const float y = x * reciprocal;
    constexpr int32_t zero = zero_code_of(code);
    if constexpr (is_signed(code)) {
        const int32_t a = truncate(on_line(float_of(magnitude_bits(y)), t));
        const int32_t index = bits_of(y) >> 31 ? zero - a : zero + a;
        return static_cast<uint8_t>(index < 0 ? 0 : index);  // there is no -1: the most negative value is index 0
    } else {
        const int32_t index = truncate(on_line(y, t));
        return static_cast<uint8_t>(code == Code::Positive && !(x > 0.0f) ? zero : index);
    }
}

// The nearest entry of any table of 256 sorted values: the number of midpoints below y. The readable reference of all
// encoders.
OPTIM8_HD uint8_t search(float y, const float* middle) {
    int found = 0;
    for (int half = code_size / 2; half > 0; half /= 2)
        if (y > middle[found + half - 1]) found += half;
    return static_cast<uint8_t>(found);
}
OPTIM8_HD float midpoint(float low, float high) { return static_cast<float>((static_cast<double>(low) + high) / 2); }

// How a block is normalized: y = x * scale * reciprocal. Below the smallest normal number 1 / absmax would
// overflow, so such a block is scaled by 2^64 (exactly) first.
struct Normalizer {
    float scale, reciprocal;
};

OPTIM8_HD Normalizer normalizer(float absmax) {
    if (absmax >= smallest_normal) return Normalizer{1.0f, reciprocal(absmax)};
    const float scale = 18446744073709551616.0f;  // 2^64
    return Normalizer{scale, absmax > 0.0f ? reciprocal(absmax * scale) : 0.0f};
}

OPTIM8_END
