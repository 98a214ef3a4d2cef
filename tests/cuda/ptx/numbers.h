// Numbers as PTX computes with them.
#pragma once

#include "ptx.h"

#include <cmath>
#include <limits>
#include <type_traits>

namespace ptx {

template <class To, class From>
To bits(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &x, sizeof to);
    return to;
}

// An operation on floats gives one NaN only.
template <class T>
T quiet(T x) {
    if constexpr (std::is_same_v<T, float>)
        return x == x ? x : bits<float>(0x7fffffffu);
    else
        return x;
}

// A sum of two doubles, rounded to a float towards 0 or downwards. `sum` and `rest` are the sum exactly.
inline float directed(double a, double b, bool down) {
    const double sum = a + b, of_b = sum - a, rest = (a - (sum - of_b)) + (b - of_b);
    if (!std::isfinite(sum)) return quiet(static_cast<float>(sum));
    if (sum == 0) return down && (std::signbit(a) || std::signbit(b)) ? -0.0f : static_cast<float>(sum);
    const float nearest = static_cast<float>(sum);
    const double sign = down || sum > 0 ? 1 : -1;
    const bool beyond = sign * nearest > sign * sum || (nearest == sum && sign * rest < 0);
    return beyond ? std::nextafter(nearest, down ? -INFINITY : 0.0f) : nearest;
}

inline float approximately(double exact, double low, double high, float x) {
    const auto above = [](double y) {
        const float f = static_cast<float>(y);
        return f < y ? std::nextafter(f, INFINITY) : f;
    };
    const auto below = [](double y) {
        const float f = static_cast<float>(y);
        return f > y ? std::nextafter(f, -INFINITY) : f;
    };
    const uint32_t pick = bits<uint32_t>(x) * 0x9e3779b1u >> 30;
    float y = static_cast<float>(exact);
    if (approximation == Approximation::Low || (approximation == Approximation::Mixed && pick == 0)) y = above(low);
    if (approximation == Approximation::High || (approximation == Approximation::Mixed && pick == 1)) y = below(high);
    return std::fabs(y) < std::numeric_limits<float>::min() ? std::copysign(0.0f, y) : y;
}
inline float flush(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }
// At most one ulp off.
inline float rcp_approx_ftz(float a) {
    const float x = flush(a);
    if (!std::isfinite(x) || x == 0) return quiet(1 / x);
    const double exact = 1 / static_cast<double>(x);
    const float nearest = static_cast<float>(exact);
    const double ulp = std::fabs(static_cast<double>(std::nextafter(nearest, INFINITY)) - nearest);
    return approximately(exact, exact - ulp, exact + ulp, x);
}
// At most 2^-22.9 off, of the value.
inline float rsqrt_approx_ftz(float a) {
    const float x = flush(a);
    if (!(x > 0) || std::isinf(x)) return x == 0 ? std::copysign(INFINITY, x) : quiet(1 / std::sqrt(x));
    const double exact = 1 / std::sqrt(static_cast<double>(x));
    return approximately(exact, exact * (1 - std::exp2(-22.9)), exact * (1 + std::exp2(-22.9)), x);
}

template <class To, class From>
To truncate(From x) {
    constexpr To least = std::numeric_limits<To>::min(), most = std::numeric_limits<To>::max();
    if (!(x == x)) return 0;
    if (x <= static_cast<From>(least)) return least;
    if (x >= static_cast<From>(most)) return most;
    return static_cast<To>(x);
}

inline uint16_t bfloat16_of(float x) {
    const uint32_t b = bits<uint32_t>(x);
    return x == x ? static_cast<uint16_t>((b + 0x7fffu + (b >> 16 & 1)) >> 16) : 0x7fff;
}
inline float half_value(uint16_t h) { return quiet(static_cast<float>(bits<_Float16>(h))); }
inline uint16_t half_of(float x) { return x == x ? bits<uint16_t>(static_cast<_Float16>(x)) : 0x7fff; }
inline uint16_t half_toward_zero(float x) {
    const uint16_t nearest = half_of(x);
    return std::fabs(half_value(nearest)) > std::fabs(x) ? nearest - 1 : nearest;
}

inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t s = selector >> (4 * i), byte = both >> (8 * (s & 7)) & 255;
        result |= (s & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);
    }
    return result;
}
inline uint32_t dot(uint32_t a, uint32_t b, uint32_t sum) {
    for (int i = 0; i < 32; i += 8)
        sum += static_cast<uint32_t>(static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i));
    return sum;
}
// Two halves of a with the lower two bytes of b.
inline uint32_t dot_halves(uint32_t a, uint32_t b, uint32_t sum) {
    for (int i = 0; i < 2; ++i)
        sum += static_cast<uint32_t>(static_cast<int16_t>(a >> (16 * i)) * static_cast<int8_t>(b >> (8 * i)));
    return sum;
}
inline uint32_t extract(uint32_t x, uint32_t first, uint32_t count) {
    const uint64_t kept = (uint64_t{1} << ((count & 255) < 32 ? count & 255 : 32)) - 1;
    return (first & 255) < 32 ? static_cast<uint32_t>(x >> (first & 255) & kept) : 0;
}

template <class F>
F larger(F a, F b) {
    if (!(a == a) || !(b == b)) return quiet(a == a ? a : b);
    return a > b || (a == b && std::signbit(b)) ? a : b;
}

}  // namespace ptx
