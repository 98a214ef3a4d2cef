// Dithered rounding of an optimizer's state to the dynamic 8-bit code.
//
// A step changes a slow state by less than half a cell of the code, so that rounding to nearest brings back the old
// code, step after step. Here a value between two neighbours of the code is stored as the upper one just so often that
// the mean of what is stored is the value itself: index = floor(position + u), u in [0, 1), where `position` is the
// piecewise linear function that is k at the value of index k, between two decades too. u is not random but a sequence
// of low discrepancy (Kronecker's) of step, block and element: nothing to store or to draw, and errors that cancel
// sooner than random ones.
//
// The largest magnitude of a block falls on the last value before 1, so that it is kept to an ulp whatever its sign
// (there is no code of -1), and a mirrored problem has the mirrored state. 1 stays unused.
#pragma once

#include "core/codec.h"
#include "core/number.h"

OPTIM8_BEGIN

enum class Rounding : uint8_t { Nearest, Dithered };

// How a step keeps the states of a rule in codes.
template <Rounding rounding_, bool roots, bool low_bytes = false>
struct Coding {
    static constexpr Rounding rounding = rounding_;
    template <class Rule, int s>
    static constexpr bool root = roots && Rule::states[s].root;
    // Whether a state has low bytes (core/code16.h). Other libraries, which keep no roots, have none.
    template <class Rule, int s>
    static constexpr bool low = low_bytes || (roots && Rule::states[s].wide);
    // The rounding whose scales its blocks have.
    template <class Rule, int s>
    static constexpr Rounding scaling = low<Rule, s> ? Rounding::Dithered : rounding_;
};

// From one decade to the next the slope of `position` falls to a third at the last value of the one, and to a fifth at
// the first of the other. So near a boundary it is the index of that last value and the least of three lines in
// t, linear in y and 0 at the last value: t, t / 3 and (t + 2) / 5. A zone has one boundary. Zones are three binades
// long, and quotients scaled such that their ends lie within decades: the exponent tells the zone.
constexpr int zones = 8, binades_of_zone = 3;
constexpr int lowest_binade = 108;  // exponent field
// With this added, numbers from -122 to 6 are fixed-point numbers with 16 bits behind the point.
constexpr float fixed_point = 250.0f;
constexpr uint32_t fixed_point_bits = 0x437a0000u;
// The other two lines as linear functions of the first, all three with fixed_point added. This float32 below 1/3 is the
// one for which rounding takes least from the second line.
constexpr float third = 0.33333331f, fifth = 0.2f;
constexpr float after_third = static_cast<float>(fixed_point - static_cast<double>(fixed_point) * third);
constexpr float after_fifth = static_cast<float>(fixed_point + 0.4 - static_cast<double>(fixed_point) * fifth);

struct DitherTables {
    float slope[32], offset[32];  // of t + fixed_point, by the low five bits of the exponent
    uint32_t last[32];            // what takes the upper half of a fixed-point number to the code of the last value
    uint32_t last16[32];          // the same for state in 16 bits, and half a cell, in units of 1/256
    float lowest, lowest16;       // what is less is taken to be of its zone; the second for state in 16 bits
    float quotient;               // a block's largest magnitude over its scaled quotient
    float absmax;                 // what is stored as absmax over that magnitude
};

constexpr DitherTables make_dither_tables(Code code) {
    DitherTables t{};
    const bool with_sign = is_signed(code);
    const int first = with_sign ? 1 : 2;
    const double smallest = decade_scale[0] * (0.1 + 0.45 / first);
    // The scaled quotient of 1. With a sign, the line from 0 to the smallest value must end with its zone. Without,
    // there is no such line; there the last zone begins at position 132, and so none is further than 122 below the last
    // value of its zone, or 6 above it.
    const double one = with_sign ? 0x1p-16 / smallest : 4 / ((132 + 1.5 - 128 * 8 / 9.0) / (128 / 0.9));
    for (int binade = 0; binade < zones * binades_of_zone; ++binade) {
        const int zone = binade / binades_of_zone, decade = zone > 0 ? zone - 1 : 0;
        const int n = first << decade;
        const bool from_zero = with_sign && zone == 0;
        const int b = (lowest_binade + binade) & 31;
        t.slope[b] = static_cast<float>((from_zero ? 1 / smallest : n * decade_inverse[decade] / 0.9) / one);
        t.offset[b] = static_cast<float>(fixed_point + (from_zero ? -1 : 0.5 - n * 10 / 9.0));
        const int last = 2 * n - (with_sign ? 1 : 2);
        t.last[b] = static_cast<uint32_t>(zero_code_of(code) + last) - (fixed_point_bits >> 16);
        t.last16[b] = (t.last[b] << 8) + 0x80u;
    }
    const int n = first << (decades - 1);
    const double last_value = 1 - 0.45 / n;
    t.lowest = static_cast<float>(with_sign ? 0x1p-17 : smallest * one);
    // The line of the first decade goes on below the smallest value, where its cell ends, half an index lower.
    t.lowest16 = static_cast<float>(with_sign ? 0x1p-17 : decade_scale[0] * 0.1 * one);
    // The position of the largest magnitude must be whole, for all roundings of its quotient: t may be off by half a
    // unit of fixed point below 0, and by three halves above, where a third counts. Without a sign the cells are half
    // as wide, so that roundings are twice as far: there what comes out above is taken down.
    const double above = (with_sign ? 0x1p-17 : 0x1p-15) * 0.9 / n;
    t.quotient = static_cast<float>(1 / ((last_value + above) * one));
    t.absmax = static_cast<float>(1 / last_value);
    return t;
}

template <Code code>
struct DitherTablesOf {
    static constexpr DitherTables all = make_dither_tables(code);
};

// Within a block the elements are spread evenly, by a multiple of the golden ratio of the range of u; blocks begin
// anywhere; and each step goes on by a number that is far from every simple fraction (Roberts 2018, "The unreasonable
// effectiveness of quasirandom sequences": the square of the inverse of the root of x^3 = x + 1).
constexpr uint32_t dither_of_element = 40503u << 16, dither_of_step = 2447445414u;  // in units of 2^-32

OPTIM8_HD uint32_t dither_time(double step) {
    return static_cast<uint32_t>(static_cast<uint64_t>(step)) * dither_of_step;
}
// u of a block's first element, in units of 2^-32. `block`: its number in the whole parameter.
OPTIM8_HD uint32_t dither_start(uint32_t block, uint32_t time) {
    const uint32_t mixed = block * 0x9e3779b1u;
    return (mixed ^ mixed >> 15) * 0x85ebca77u + time;
}
// u of an element likewise; its upper half counts. With the same u all states of a rule would be rounded up at once,
// and sequences of their own would take more instructions: the second state takes that of a neighbour, the third that
// of the next but one.
template <int state>
OPTIM8_HD constexpr uint32_t dither(uint32_t start, uint32_t element) {
    return start + (element ^ state) * dither_of_element;
}

// A word moved up by `bits`, and below it the upper bits of another.
template <int bits>
OPTIM8_HD uint32_t funnel(uint32_t upper, uint32_t lower) {
#if defined(__CUDA_ARCH__)
    return __funnelshift_l(lower, upper, bits);  // one instruction together with an addition
#else
    return upper << bits | lower >> (32 - bits);
#endif
}

// The least of three numbers above 0.
OPTIM8_HD float least(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
    // Their bits order like them; from compute capability 9.0 on an instruction takes three integers.
    const int32_t x = __float_as_int(a), y = __float_as_int(b), z = __float_as_int(c);
    return __int_as_float(minimum(x, minimum(y, z)));
#else
    return smaller(a, smaller(b, c));
#endif
}

// The position of a quotient y relative to the last value of its zone, as a fixed-point number. `exponent`: of
// `clamped`, which is y, or what is the least of its zone.
template <Code code, class I, class T>
OPTIM8_HD float least_line(float y, float clamped, I exponent, const T& t) {
    static_assert(code == Code::Signed || code == Code::Positive, "what states have");
    // Where nothing becomes 0, less than the smallest value has its position.
    const float line = fma(is_signed(code) ? y : clamped, of_binade(t.slope, exponent), of_binade(t.offset, exponent));
    return least(line, fma(line, third, after_third), fma(line, fifth, after_fifth));
}

// The code of a quotient y = |x| * reciprocal as the third byte: of position + u as a fixed-point number in units of
// 2^-16. `clamped`, `exponent`: as for least_line. `T`: as for on_line.
template <Code code, class I, class T>
OPTIM8_HD uint32_t encode_quotient(float y, float clamped, I exponent, uint32_t u, const T& t) {
    return funnel<16>(of_binade(t.last, exponent), u) + bits_of(least_line<code>(y, clamped, exponent, t));
}
// That of |x|, finite, in a block whose largest magnitude has the given reciprocal.
template <Code code, class T>
OPTIM8_HD uint32_t encode_magnitude(float x, float reciprocal, uint32_t u, const T& t) {
    const float y = (is_signed(code) ? absolute(x) : x) * reciprocal;
    const float clamped = maximum(y, t.lowest);
    return encode_quotient<code>(y, clamped, bits_of(clamped) >> 23, u, t);
}

// The same of x, from that of |x|. `root`: x is the square root of a float that is not negative, nor -0, or a multiple
// of it.
template <Code code, bool root>
OPTIM8_HD uint32_t with_sign(uint32_t fixed, float x) {
    constexpr uint32_t below_one = 0xfeffffu;  // the greatest with code 254
    if constexpr (is_signed(code)) {
        return bits_of(x) >> 31 ? below_one - fixed : fixed;  // codes of x and -x add up to 254
    } else if constexpr (root) {
        static_assert(0x1p-75f > 0x1.fep-126f, "a root has more bits than any fixed-point number");
        const uint32_t most = bits_of(x) < below_one ? bits_of(x) : below_one;
        return fixed < most ? fixed : most;
    } else {
        return x > 0.0f ? (fixed < below_one ? fixed : below_one) : 0u;
    }
}
template <Code code, bool root = false, class T>
OPTIM8_HD uint32_t encode_dithered(float x, float reciprocal, uint32_t u, const T& t) {
    return with_sign<code, root>(encode_magnitude<code>(x, reciprocal, u, t), x);
}

// How a block of a state is stored: its absmax, and what takes its values to quotients, x * scale * reciprocal.
struct BlockScale {
    float absmax;
    Normalizer normal;
};
// With dithered rounding a quotient of 1 is far from 1 itself (DitherTables): no absmax has a reciprocal that is
// subnormal. What is below this limit is scaled first, or small ones would have infinity.
constexpr float dither_limit = 0x1p-120f, dither_scale = 0x1p64f;
// What takes values to `scale` times their quotients, a power of two. `F`: the number type to compute it in, of normal
// numbers below 2^124.
template <Code code, class F = float>
OPTIM8_HD float dither_reciprocal(float largest, float scale = 1) {
    return plain(reciprocal(F(largest * (DitherTablesOf<code>::all.quotient / scale))));
}
template <Code code, bool root>
OPTIM8_HD float dither_absmax(float largest) {
    constexpr float of_absmax = DitherTablesOf<code>::all.absmax;
    // The square of a root that is kept to an ulp must be finite.
    constexpr float most = root ? 0x1.fffff0p63f * of_absmax : largest_finite;
    return smaller(largest * of_absmax, most);
}
// `root`: the values are square roots, which lie far within the range of float32.
template <Code code, Rounding rounding, bool root = false>
OPTIM8_HD BlockScale block_scale(float largest) {
    if constexpr (rounding == Rounding::Nearest && root) {
        return {largest, {1.0f, largest > 0.0f ? reciprocal(largest) : 0.0f}};
    } else if constexpr (rounding == Rounding::Nearest) {
        return {largest, normalizer(largest)};
    } else {
        const float scale = !root && largest < dither_limit ? dither_scale : 1.0f;
        const float inverse = largest > 0.0f ? dither_reciprocal<code>(largest * scale) : 0.0f;
        return {dither_absmax<code, root>(largest), {scale, inverse}};
    }
}

// A value of a state as codes stand for it, and the value again.
template <bool root, class F>
OPTIM8_HD F keep(F x) {
    if constexpr (root)
        return square_root(x);
    else
        return x;
}
template <bool root, class F>
OPTIM8_HD F restore(F x) {
    if constexpr (root)
        return x * x;
    else
        return x;
}

OPTIM8_END
