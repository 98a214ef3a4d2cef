// The 4-bit codes NF4 (Dettmers et al. 2023, arXiv 2305.14314) and FP4 (two exponent bits, one mantissa bit), and
// their nearest value. Packed, two codes share a byte: the first value has the high nibble.
#pragma once

#include "core/scalar.h"

namespace optim8 {
enum class Fourbit : uint8_t { NF4, FP4 };
}

OPTIM8_BEGIN

constexpr int fourbit_size = 16;
constexpr int fourbit_cells = 32;  // a power of two: cells are numbered modulo it

// By code. FP4 has zero twice, as the bit patterns 0 and 8; both are +0.
constexpr float nf4_values[fourbit_size] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};
constexpr float fp4_magnitudes[fourbit_size / 2] = {0.0f, 0.0625f, 8.0f, 12.0f, 4.0f, 6.0f, 2.0f, 3.0f};

// Values, and the nearest code of a quotient y in [-1, 1] in one look-up and one compare. [-1, 1] is cut into cells of
// 1/16, open below and closed above; none holds more than one midpoint of neighbouring values, and a quotient that is
// exactly a midpoint takes the lower value. y = -1 alone falls into a cell of its own, which shares its number with
// the topmost one: there the midpoint is 0.
struct FourbitTables {
    float value[fourbit_size];
    float midpoint[fourbit_cells];
    int32_t below[fourbit_cells], above[fourbit_cells];  // the codes below (or at) and above the midpoint
};

constexpr float fourbit_value(Fourbit type, int code) {
    if (type == Fourbit::NF4) return nf4_values[code];
    const float magnitude = fp4_magnitudes[code & 7] / 12.0f;
    return code > 8 ? -magnitude : magnitude;
}

constexpr FourbitTables make_fourbit(Fourbit type) {
    FourbitTables t{};
    int order[fourbit_size] = {};  // codes by value, and by number where values are equal
    for (int code = 0; code < fourbit_size; ++code) {
        t.value[code] = fourbit_value(type, code);
        int place = code;
        for (; place > 0 && t.value[order[place - 1]] > t.value[code]; --place) order[place] = order[place - 1];
        order[place] = code;
    }
    for (int cell = 1 - fourbit_cells / 2; cell < fourbit_cells / 2; ++cell) {
        const float lower = static_cast<float>(cell - 1) / 16, upper = static_cast<float>(cell) / 16;
        int rank = 0, inside = 0;
        float midpoint = upper;  // nothing in the cell lies above it
        for (int i = 0; i + 1 < fourbit_size; ++i) {
            const float m = (t.value[order[i]] + t.value[order[i + 1]]) / 2;
            if (m <= lower) ++rank;
            if (m > lower && m < upper) {
                midpoint = m;
                ++inside;
            }
        }
        const int c = cell & (fourbit_cells - 1);
        t.midpoint[c] = midpoint;
        t.below[c] = order[rank];
        t.above[c] = inside <= 1 ? order[rank + inside] : -1;
    }
    t.midpoint[fourbit_cells / 2] = 0.0f;
    t.below[fourbit_cells / 2] = order[0];
    t.above[fourbit_cells / 2] = order[fourbit_size - 1];
    return t;
}

constexpr bool fourbit_cells_suffice(const FourbitTables& t) {
    for (int c = 0; c < fourbit_cells; ++c)
        if (t.above[c] < 0) return false;
    return true;
}

template <Fourbit type>
struct FourbitOf {
    static constexpr FourbitTables all = make_fourbit(type);
    static_assert(fourbit_cells_suffice(all), "a cell holds two midpoints");
};

// The cell of y in [-1, 1]: 16 y rounded up.
OPTIM8_HD int32_t fourbit_cell(float y) {
    const float scaled = y * 16.0f;
    const int32_t truncated = static_cast<int32_t>(scaled);
    return (truncated + static_cast<int32_t>(scaled > static_cast<float>(truncated))) & (fourbit_cells - 1);
}

// The nearest code of a quotient y = x / absmax, clamped to [-1, 1]. `T` is FourbitTables, or what stands for it where
// the lanes of a warp hold the tables; so every look-up is made by every lane.
template <class T>
OPTIM8_HD int32_t encode_fourbit(float y, const T& t) {
    const int32_t cell = fourbit_cell(y);
    const int32_t below = t.below[cell], above = t.above[cell];
    return y > t.midpoint[cell] ? above : below;
}

// x times the reciprocal of absmax may exceed 1 by a rounding.
OPTIM8_HD float clamp_unit(float y) { return y > 1.0f ? 1.0f : (y < -1.0f ? -1.0f : y); }

// The quotient of any value: a NaN counts as 0, an infinity as the largest of its sign. `scaled` is the value times
// the block's scale (core/codec.h, Normalizer).
OPTIM8_HD float fourbit_quotient(float scaled, float reciprocal) {
    const uint32_t magnitude = magnitude_bits(scaled);
    if (magnitude > inf_bits) return 0.0f;
    if (magnitude == inf_bits) return scaled > 0.0f ? 1.0f : -1.0f;
    return clamp_unit(scaled * reciprocal);
}

OPTIM8_END
