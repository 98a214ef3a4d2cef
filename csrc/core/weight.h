// Weights that are wider than their parameter: 16-bit parameters whose rounding is completed by low bits beside them,
// or dithered.
//
// A weight is a 32-bit integer whose upper half is that of a 16-bit number: for bfloat16 the bits of the float32; for
// float16 sign, 5 bits of exponent and 26 of mantissa, of which the last 3 are 0. So bits below the upper half are a
// fraction of the number's unit in the last place, whatever it is; they order like the magnitude, and rounding is the
// addition of an integer. Where float16 is subnormal, below 2^-14, a weight is a multiple of 2^-37.
//
// The parameter is the nearest 16-bit number, ties away from 0, and the low bits, which are signed, are the rest. Ties
// to even would leave 65537 weights around each even number, which 16 bits cannot tell apart.
#pragma once

#include "core/dither.h"
#include "core/storage.h"

namespace optim8 {

// What is kept of a weight: 16 bits rounded to nearest even (what the storage itself does), 16 dithered, 24 dithered,
// or all of float32's.
enum class Weight : uint8_t { Plain, Dithered, Bits24, Bits32 };
// Of the low bits.
constexpr int64_t bytes_of(Weight weight) { return weight == Weight::Bits32 ? 2 : weight == Weight::Bits24 ? 1 : 0; }

}  // namespace optim8

OPTIM8_BEGIN

constexpr uint32_t half_of_param = 0x8000u;         // half a unit in the parameter's last place
constexpr uint32_t half_bias = (127u - 15u) << 23;  // between the exponents of float32 and float16
constexpr float half_least_normal = 0x1p-14f;

template <class P>
OPTIM8_HD uint32_t weight_bits(float x);

template <>
OPTIM8_HD uint32_t weight_bits<bfloat16>(float x) {
    return magnitude_bits(x) > inf_bits ? 0x7fc00000u : bits_of(x);
}
template <>
OPTIM8_HD uint32_t weight_bits<float16>(float x) {
    const uint32_t magnitude = magnitude_bits(x), sign = bits_of(x) ^ magnitude;
    const uint32_t least = bits_of(half_least_normal);
    // Added to the least normal number, a smaller one has its unit.
    const uint32_t below = bits_of(float_of(magnitude) + half_least_normal) - least;
    const uint32_t normal = magnitude < 0x47800000u ? magnitude - half_bias : 0x0f800000u;  // 2^16 and more: infinity
    const uint32_t bits = (magnitude < least ? below : normal) << 3;
    return magnitude > inf_bits ? 0x7e000000u : sign | bits;
}

template <class P>
OPTIM8_HD float weight_value(uint32_t bits);

template <>
OPTIM8_HD float weight_value<bfloat16>(uint32_t bits) {
    return float_of(bits);
}
template <>
OPTIM8_HD float weight_value<float16>(uint32_t bits) {
    const uint32_t sign = bits & ~abs_mask, magnitude = (bits & abs_mask) >> 3;
    const uint32_t least = bits_of(half_least_normal);
    const uint32_t below = bits_of(float_of(magnitude + least) - half_least_normal);
    const uint32_t normal = magnitude + (magnitude < 0x0f800000u ? half_bias : 2 * half_bias);
    return float_of(sign | (magnitude < least - half_bias ? below : normal));
}

// A weight from the bits of its parameter, and its low bits as a signed number of 16 bits. Low bits that would change
// the sign are not of this parameter, which someone has set to 0.
OPTIM8_HD uint32_t join_weight(uint16_t param, int32_t low) {
    const uint32_t upper = static_cast<uint32_t>(param) << 16, joined = upper + static_cast<uint32_t>(low);
    return ((upper ^ joined) & ~abs_mask) != 0 ? upper : joined;
}
// Low bits in a byte, and in two.
OPTIM8_HD int32_t low_of(uint8_t byte) { return static_cast<int32_t>(static_cast<int8_t>(byte)) * 256; }
OPTIM8_HD int32_t low_of(int16_t bytes) { return bytes; }

// What is kept of a weight; `u`: of the element, in units of 2^-32. What is 0 stays so, and what is infinite. Of one
// that has no low bits only the parameter counts, whose rounding to nearest then ends in a truncation. Bits below those
// that are kept say nothing.
OPTIM8_HD uint32_t keep_weight(Weight kind, uint32_t weight, uint32_t u) {
    if (kind == Weight::Bits32) return weight;
    return kind == Weight::Bits24 ? weight + (u >> 24) : weight + (u >> 16) - half_of_param;
}

// The parameter, and the low bits.
OPTIM8_HD uint16_t param_of_weight(uint32_t weight) { return static_cast<uint16_t>((weight + half_of_param) >> 16); }
OPTIM8_HD int16_t low_of_weight(uint32_t weight) { return static_cast<int16_t>(weight); }
OPTIM8_HD uint8_t low_of_weight24(uint32_t weight) { return static_cast<uint8_t>(weight >> 8); }

// Which of the sequences of a step (core/dither.h) a parameter takes; states have those before.
constexpr int dither_of_param = 3;

OPTIM8_END
