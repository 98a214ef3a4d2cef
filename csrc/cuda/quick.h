// The number type of a step's main path. Its square root and reciprocal are those of `float`, bit for bit, wherever
// `in_range` is still true at the end: correctly rounded, from the instructions that nvcc itself makes of __fsqrt_rn
// and __frcp_rn, without a branch for each value. Where it is false the value must be computed anew as a float.
#pragma once

#include "core/number.h"
#include "cuda/lanes.h"

OPTIM8_BEGIN

// The hardware's approximations, good to about an ulp; 0 and infinity for subnormal operands and results. Where no
// nvcc compiles, whoever stands for CUDA has them.
#if defined(__CUDACC__)
OPTIM8_DEVICE float reciprocal_approximately(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
OPTIM8_DEVICE float inverse_root_approximately(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif

struct Quick {
    float x;
    bool in_range;
    Quick() = default;
    OPTIM8_DEVICE explicit Quick(float x, bool in_range = true) : x(x), in_range(in_range) {}
};

OPTIM8_DEVICE float plain(Quick a) { return a.x; }

// Whether a comparison holds, and whether that is so for floats.
struct QuickCondition {
    bool holds, in_range;
};

OPTIM8_DEVICE Quick operator+(Quick a, Quick b) { return Quick(a.x + b.x, a.in_range && b.in_range); }
OPTIM8_DEVICE Quick operator-(Quick a, Quick b) { return Quick(a.x - b.x, a.in_range && b.in_range); }
OPTIM8_DEVICE Quick operator-(Quick a) { return Quick(-a.x, a.in_range); }
OPTIM8_DEVICE Quick operator*(Quick a, Quick b) { return Quick(a.x * b.x, a.in_range && b.in_range); }
OPTIM8_DEVICE Quick fma(Quick a, Quick b, Quick c) {
    return Quick(fma(a.x, b.x, c.x), a.in_range && b.in_range && c.in_range);
}
OPTIM8_DEVICE Quick maximum(Quick a, Quick b) { return Quick(maximum(a.x, b.x), a.in_range && b.in_range); }
OPTIM8_DEVICE Quick minimum(Quick a, Quick b) { return Quick(minimum(a.x, b.x), a.in_range && b.in_range); }
OPTIM8_DEVICE Quick absolute(Quick a) { return Quick(absolute(a.x), a.in_range); }
OPTIM8_DEVICE QuickCondition operator<(Quick a, Quick b) { return {a.x < b.x, a.in_range && b.in_range}; }
OPTIM8_DEVICE QuickCondition operator>(Quick a, Quick b) { return {a.x > b.x, a.in_range && b.in_range}; }
// What is left out may be out of range.
OPTIM8_DEVICE Quick select(QuickCondition condition, Quick a, Quick b) {
    return Quick(condition.holds ? a.x : b.x, condition.in_range && (condition.holds ? a.in_range : b.in_range));
}
// In fewer instructions than that of core/scalar.h. `one`: the bits of 1.
OPTIM8_DEVICE float sign_of(float x, uint32_t one) {
    return fabsf(x) > 0.0f ? float_of((bits_of(x) & ~abs_mask) | one) : 0.0f;
}
OPTIM8_DEVICE Quick sign(Quick a) { return Quick(sign_of(a.x, bits_of(1.0f)), a.in_range); }

// The square root times 2^32, from an inverse root by one step of Newton's iteration. At 2^64 times its size no operand
// below 2^63 under- or overflows on the way, subnormal numbers included; 0 gives 0.
OPTIM8_DEVICE float scaled_root(float x) {
    const float scaled = x * 0x1p64f;
    const float inverse = inverse_root_approximately(maximum(scaled, smallest_normal));  // at 2^-32
    const float root = scaled * inverse;
    const float rest = fma(-root, root, scaled);  // at 2^64, exact
    return fma(rest, inverse * 0.5f, root);
}
// A negative number is not in range, nor is a NaN.
OPTIM8_DEVICE Quick square_root(Quick a) {
    constexpr uint32_t limit = 0x5f000000u;  // 2^63
    return Quick(scaled_root(a.x) * 0x1p-32f, a.in_range && bits_of(a.x) < limit);
}

// By one step of Newton's iteration. Neither the number nor its reciprocal may be subnormal, and it may not be 0.
OPTIM8_DEVICE Quick reciprocal(Quick a) {
    keep_in_register(a.x);  // or nvcc would make -a anew where `a` is a product with a constant
    const float inverse = reciprocal_approximately(a.x);
    const float rest = fma(-a.x, inverse, 1.0f);
    const float size = fabsf(a.x);
    return Quick(fma(inverse, rest, inverse), a.in_range && size >= smallest_normal && size < 0x1p126f);
}

static_assert(Vocabulary<Quick>::complete);

OPTIM8_END
