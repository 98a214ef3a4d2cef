// The number type `float` with the operations that rules and codecs are written in; core/number.h says what those of
// rules mean.
#pragma once

#include "core/platform.h"

#include <cmath>
#include <cstring>

OPTIM8_BEGIN

OPTIM8_HD uint32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(x);
#else
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
#endif
}

OPTIM8_HD float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
#endif
}

OPTIM8_HD float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, c);
#else
    return __builtin_fmaf(a, b, c);
#endif
}

OPTIM8_HD double fma(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
    return __fma_rn(a, b, c);
#else
    return __builtin_fma(a, b, c);
#endif
}
OPTIM8_HD float square_root(float x) {
#if defined(__CUDA_ARCH__)
    return __fsqrt_rn(x);
#else
    return __builtin_sqrtf(x);
#endif
}

OPTIM8_HD float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
    return __frcp_rn(x);
#else
    return 1.0f / x;
#endif
}

// Of any number type the float that it holds.
OPTIM8_HD float plain(float x) { return x; }

OPTIM8_HD float maximum(float a, float b) { return a > b ? a : b; }
OPTIM8_HD float minimum(float a, float b) { return a < b ? a : b; }
OPTIM8_HD float select(bool condition, float a, float b) { return condition ? a : b; }

OPTIM8_HD uint32_t maximum(uint32_t a, uint32_t b) { return a > b ? a : b; }
OPTIM8_HD uint32_t minimum(uint32_t a, uint32_t b) { return a < b ? a : b; }

OPTIM8_HD int32_t truncate(float x) { return static_cast<int32_t>(x); }
OPTIM8_HD int32_t minimum(int32_t a, int32_t b) { return a < b ? a : b; }

OPTIM8_HD float sign(float x) { return static_cast<float>(static_cast<int>(x > 0.0f) - static_cast<int>(x < 0.0f)); }

constexpr uint32_t abs_mask = 0x7fffffffu;
constexpr uint32_t inf_bits = 0x7f800000u;
constexpr float smallest_normal = 1.17549435e-38f;
constexpr float largest_finite = 3.40282347e+38f;

// |x| as an integer. It orders like |x|, with infinity and NaN above every finite value, so that one integer maximum
// gives a block's largest magnitude and says whether the block holds anything that is not finite.
OPTIM8_HD uint32_t magnitude_bits(float x) { return bits_of(x) & abs_mask; }
OPTIM8_HD float absolute(float x) {
#if defined(__CUDA_ARCH__)
    return fabsf(x);  // no instruction of its own
#else
    return float_of(magnitude_bits(x));
#endif
}
OPTIM8_HD bool is_finite(float x) { return magnitude_bits(x) < inf_bits; }

OPTIM8_END
