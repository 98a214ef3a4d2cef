// 16-bit storage types and their conversion to and from float32, to nearest, ties to even. Every backend gives the same
// bits for every number; what bits a NaN has beyond being one is not promised.
#pragma once

#include "core/scalar.h"

namespace optim8 {

enum class Storage : uint8_t { Float32, BFloat16, Float16 };
constexpr int64_t bytes_of(Storage storage) { return storage == Storage::Float32 ? 4 : 2; }

}  // namespace optim8

OPTIM8_BEGIN

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

OPTIM8_HD float to_float(float x) { return x; }
OPTIM8_HD float to_float(bfloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
OPTIM8_HD float to_float(float16 x) {
#if defined(__CUDA_ARCH__)
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
    return wide;
#else
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
    const uint32_t rest = x.bits & 0x7fffu;
    if (rest >= 0x7c00u) {
        const uint32_t quiet = rest > 0x7c00u ? 0x400000u : 0u;
        return float_of(sign | inf_bits | ((rest & 0x3ffu) << 13) | quiet);
    }
    if (rest >= 0x400u) return float_of(sign | ((rest << 13) + ((127u - 15u) << 23)));
    const float magnitude = static_cast<float>(rest) * 5.9604644775390625e-08f;  // subnormal: rest * 2^-24
    return float_of(sign | bits_of(magnitude));
#endif
}

template <class T>
OPTIM8_HD T from_float(float x);

template <>
OPTIM8_HD float from_float<float>(float x) {
    return x;
}

template <>
OPTIM8_HD bfloat16 from_float<bfloat16>(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    bfloat16 narrow;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(x));
    return narrow;
#else
    const uint32_t bits = bits_of(x);
    if ((bits & abs_mask) > inf_bits) return bfloat16{0x7fc0u};
    return bfloat16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

template <>
OPTIM8_HD float16 from_float<float16>(float x) {
#if defined(__CUDA_ARCH__)
    float16 narrow;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(x));
    return narrow;
#else
    const uint32_t bits = bits_of(x);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    const uint32_t rest = bits & abs_mask;
    if (rest > inf_bits) return float16{static_cast<uint16_t>(sign | 0x7e00u | ((rest >> 13) & 0x3ffu))};
    if (rest >= 0x47800000u) return float16{static_cast<uint16_t>(sign | 0x7c00u)};  // 2^16 and more
    uint32_t half;
    if (rest >= 0x38800000u) {  // 2^-14: normal in half precision
        half = (rest - ((127u - 15u) << 23) + 0xfffu + ((rest >> 13) & 1u)) >> 13;
    } else {
        // Subnormal: adding 0.5 puts the units of 2^-24 in the last bit of the sum, rounded to nearest even.
        half = bits_of(float_of(rest) + 0.5f) - bits_of(0.5f);
    }
    return float16{static_cast<uint16_t>(sign | half)};
#endif
}

template <class T>
struct TypeOf {
    using type = T;
};
// work(TypeOf<T>) with the type that is stored so.
template <class Work>
auto with_storage(Storage storage, const Work& work) {
    switch (storage) {
        case Storage::Float32:
            return work(TypeOf<float>{});
        case Storage::BFloat16:
            return work(TypeOf<bfloat16>{});
        default:
            return work(TypeOf<float16>{});
    }
}

OPTIM8_END
