// What every block kernel needs: a short last group made whole, and a block's largest magnitude.
#pragma once

#include "cpu/kernels/simd.h"

#include <cstring>

OPTIM8_BEGIN

// Zero-padded copies of the last values, fewer than a group, so that the loops know whole groups only.
template <class T>
struct Padded {
    T values[group] = {};
    Padded(const T* from, int64_t n) { std::memcpy(values, from, static_cast<size_t>(n) * sizeof(T)); }
};

// The largest magnitude as bits: at least inf_bits when the block holds anything that is not finite.
template <class T>
uint32_t largest_bits(const T* values, int64_t n) {
    constexpr int lanes = group / width;
    U largest(0u);
    int64_t i = 0;
    for (; i + group <= n; i += group)
        for (int j = 0; j < lanes; ++j) largest = maximum(largest, magnitude_bits(load(values + i + j * width)));
    if (i < n) {
        const Padded<T> rest(values + i, n - i);
        for (int j = 0; j < lanes; ++j) largest = maximum(largest, magnitude_bits(load(rest.values + j * width)));
    }
    return reduce_max(largest);
}

// At most a group of values as float32.
template <class T>
void widen(const T* from, int64_t n, float (&to)[group]) {
    if (n == group) {
        for (int j = 0; j < group / width; ++j) store(to + j * width, load(from + j * width));
    } else {
        for (int64_t i = 0; i < n; ++i) to[i] = to_float(from[i]);
    }
}

// The largest magnitude below a limit. Infinity as the limit leaves out what is not finite; a smaller one outliers too.
template <class T>
uint32_t largest_bits_below(const T* values, int64_t n, uint32_t limit) {
    uint32_t largest[group] = {}, result = 0;
    for (int64_t i = 0; i < n; i += group) {
        float x[group] = {};
        widen(values + i, n - i < group ? n - i : group, x);
        for (int j = 0; j < group; ++j) {
            const uint32_t bits = magnitude_bits(x[j]);
            largest[j] = maximum(largest[j], bits < limit ? bits : 0u);
        }
    }
    for (const uint32_t bits : largest) result = maximum(result, bits);
    return result;
}

OPTIM8_END
