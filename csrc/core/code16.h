// State in 16 bits: the nearest code of the dynamic 8-bit code, and a low byte that says where between this value and
// its neighbours the state lies, 256 positions to a cell, 128 being the value itself. So whoever reads the codes alone
// reads state in 8 bits.
//
// Both together are one number of 16 bits, code * 256 + low: the position in units of 1/256 of a cell, plus a half.
//
// Scales are those of dithered rounding (core/dither.h). A position is `position` of that file rounded to such a unit,
// down after a number u in [0, 1) of a unit has been added: the next eight bits of dithering, or a half for nearest.
#pragma once

#include "core/dither.h"

OPTIM8_BEGIN

constexpr uint8_t middle_low = 128;
// The number of 16 bits that stands for 0.
OPTIM8_HD constexpr uint32_t zero16_of(Code code) { return zero_code_of(code) * 256u + middle_low; }

constexpr uint32_t u_of_nearest = 0x80000000u;
// What is added to position + u so that the third byte becomes the nearest code; in last16 already.
constexpr uint32_t half_cell = 0x8000u;

// The number of 16 bits of |x| in the second and third byte of a word; what is in the others says nothing. Without a
// sign a positive value is at least half a cell above 0, so that its code is not that of 0. Otherwise as
// encode_magnitude.
template <Code code, class T>
OPTIM8_HD uint32_t encode16_magnitude(float x, float reciprocal, uint32_t u, const T& t) {
    const float y = (is_signed(code) ? absolute(x) : x) * reciprocal;
    const float clamped = maximum(y, t.lowest16);
    const uint32_t exponent = bits_of(clamped) >> 23;
    const uint32_t fixed =
        funnel<8>(of_binade(t.last16, exponent), u) + bits_of(least_line<code>(y, clamped, exponent, t));
    constexpr uint32_t most = ((code_size - 2) * 256u + middle_low) << 8 | 0xffu;
    if constexpr (is_signed(code))
        return fixed;
    else
        return x > 0.0f ? (fixed < most ? fixed : most) : zero16_of(code) << 8;
}

// The number of x; that of -x is as far on the other side of that of 0.
template <Code code, class T>
OPTIM8_HD uint32_t encode16(float x, float reciprocal, uint32_t u, const T& t) {
    const uint32_t number = encode16_magnitude<code>(x, reciprocal, u, t) >> 8 & 0xffffu;
    return is_signed(code) && bits_of(x) >> 31 ? 2 * zero16_of(code) - number : number;
}

OPTIM8_HD uint8_t code_of16(uint32_t number) { return static_cast<uint8_t>(number >> 8); }
OPTIM8_HD uint8_t low_of16(uint32_t number) { return static_cast<uint8_t>(number); }
OPTIM8_HD uint32_t number16(uint8_t code, uint8_t low) { return code * 256u + low; }

// The inverse of `position`: a line for each whole position below, in units of 1/256 of an index.
struct Decode16Tables {
    float slope[code_size], offset[code_size];
};

constexpr double exact_centre(int index, int first) {  // of cell `index` counted from n in its decade: n <= index < 2n
    int decade = 0;
    while (index >= first << (decade + 1)) ++decade;
    const int n = first << decade;
    return decade_scale[decade] * (0.1 + 0.9 * (index - n + 0.5) / n);
}
constexpr Decode16Tables make_decode16_tables(Code code) {
    Decode16Tables t{};
    const int first = is_signed(code) ? 1 : 2, shift = is_signed(code) ? 0 : 1;
    const int one = is_signed(code) ? 128 : 255;  // the index of 1, which state in 8 bits may have
    for (int i = 0; i <= one; ++i) {
        // The first of the two values that the line goes through. Below the smallest the line of its decade goes on
        // where nothing positive becomes 0.
        const int from = i == one ? i - 1 : (i == 0 && shift == 1 ? 1 : i);
        const double low = from == 0 ? 0 : exact_centre(from + shift, first);
        const double slope = (from + 1 == one ? 1 : exact_centre(from + 1 + shift, first)) - low;
        t.slope[i] = static_cast<float>(slope / 256);
        t.offset[i] = static_cast<float>(low - slope * from);
    }
    return t;
}
template <Code code>
struct Decode16TablesOf {
    static constexpr Decode16Tables all = make_decode16_tables(code);
};

// The quotient that a number of 16 bits stands for.
template <Code code>
OPTIM8_HD float decode16(uint32_t number, const Decode16Tables& t) {
    const int32_t signed_position = static_cast<int32_t>(number) - static_cast<int32_t>(zero16_of(code));
    const int32_t position = signed_position < 0 ? -signed_position : signed_position;
    const int index = position >> 8;
    const float value = fma(static_cast<float>(position), t.slope[index], t.offset[index]);
    if constexpr (is_signed(code))
        return signed_position < 0 ? -value : value;
    else
        return maximum(value, 0.0f);  // 0 is off the line
}

OPTIM8_END
