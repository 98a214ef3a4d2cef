// The linear int8 code of LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339): a row's values are 127 x / absmax,
// rounded to nearest, ties to even; a product of two such matrices is scaled back by row * column / 127^2.
#pragma once

#include "core/scalar.h"

OPTIM8_BEGIN

constexpr double int8_top = 127.0;

// What turns a value into a code; 0 for a row of zeros.
OPTIM8_HD double int8_factor(float absmax) { return absmax > 0.0f ? int8_top / absmax : 0.0; }

// The nearest integer to x * factor, |x| <= absmax. The first pair of additions rounds to a multiple of 2^-40: that
// undoes float64 rounding where 127 x / absmax is exactly half-way between integers, and moves nothing else across,
// because float32 x and absmax put the quotient either on such a tie or at least 2^-32 away. The second pair rounds
// to an integer, ties to even.
OPTIM8_HD int8_t encode_int8(float x, double factor) {
    constexpr double to_fortieth = 6144.0;             // 1.5 * 2^12
    constexpr double to_integer = 6755399441055744.0;  // 1.5 * 2^52
    const double quotient = (x * factor + to_fortieth) - to_fortieth;
    return static_cast<int8_t>(static_cast<int32_t>((quotient + to_integer) - to_integer));
}

// The same in float32, where that tells: the code is the lowest byte of `bits` if `distance` is below `int8_sure`. Two
// roundings put x * factor at most 127 * 2^-23 from the quotient, so an integer that is nearer than that to it is the
// nearest to the quotient too; `distance`, from the product to the integer, is exact. float64 takes many times as long
// on most GPUs.
struct QuickInt8 {
    uint32_t bits;
    float distance;
};
constexpr float int8_sure = 0.5f - 0x1p-15f;
OPTIM8_HD QuickInt8 encode_int8_quickly(float x, float factor) {
    constexpr float to_integer = 12582912.0f;  // 1.5 * 2^23
    const float product = x * factor, shifted = product + to_integer;
    return {bits_of(shifted), absolute(product - (shifted - to_integer))};
}
// Whether the factor is a normal float32, with room beside it, or 0.
OPTIM8_HD bool has_quick_int8(double factor) { return factor == 0.0 || (factor > 0x1p-120 && factor < 0x1p120); }

// The code of anything: a NaN counts as 0, an infinity as the largest of its sign.
OPTIM8_HD int8_t encode_int8_checked(float x, double factor) {
    const uint32_t magnitude = magnitude_bits(x);
    if (magnitude > inf_bits) return 0;
    if (magnitude == inf_bits) return x > 0.0f ? 127 : -127;
    return encode_int8(x, factor);
}

OPTIM8_HD float decode_int8(int8_t code, float absmax) {
    return static_cast<float>(static_cast<double>(code) * absmax / int8_top);
}

// One sum of a product of codes, scaled back. `row_scale` is row absmax / 127^2.
OPTIM8_HD double int8_row_scale(float row_absmax) { return row_absmax / (int8_top * int8_top); }
OPTIM8_HD float scale_int8(int32_t sum, double row_scale, float column_absmax, float bias) {
    return static_cast<float>(sum * (row_scale * column_absmax) + bias);
}

OPTIM8_END
