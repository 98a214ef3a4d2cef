// Look-up tables in the forms that vector instructions can read: few entries, found by bits of a number. They are made
// of those of csrc/core at compile time, where it is checked too that so few entries are enough.
#pragma once

#include "core/code16.h"
#include "core/codec.h"
#include "core/dither.h"

OPTIM8_BEGIN

// The four bytes of each of the 256 table values, a plane a byte.
struct alignas(64) Planes {
    uint8_t byte[4][code_size];
};
constexpr uint32_t constant_bits(float x) {
    // std::bit_cast is C++20; table values are 0 or normal numbers, so the fields can be computed.
    if (x == 0) return 0;
    const uint32_t sign = x < 0 ? 0x80000000u : 0u;
    const float magnitude = x < 0 ? -x : x;
    return sign | static_cast<uint32_t>(exponent_field(magnitude)) << 23 | mantissa_field(magnitude);
}
constexpr Planes make_planes(const CodeTables& t) {
    Planes planes{};
    for (int i = 0; i < code_size; ++i)
        for (int b = 0; b < 4; ++b) planes.byte[b][i] = static_cast<uint8_t>(constant_bits(t.value[i]) >> (8 * b));
    return planes;
}
template <Code code>
struct PlanesOf {
    static constexpr Planes all = make_planes(Tables<code>::all);
};

// The eight zones in eight entries, and a rule that gives the zone of y or the one before it: the upper half of the
// bits of y, which is close to a logarithm, times `factor`, shifted right by 16; `first` stands for zone 0. Entries are
// placed by the low three bits of that. What is below `lowest` is taken for that, which has the same code.
struct ZoneTables {
    float threshold[8];  // of the next zone; infinity after the last
    float slope[8], offset[8];
    int32_t last[8];
    float lowest;
    int factor, first;
};
constexpr int exact_zone(const CodeTables& t, double y) {
    int zone = 0;
    while (zone < decades && y >= t.threshold[zone]) ++zone;
    return zone;
}
constexpr double value_of_half(int half) {  // of the bits half << 16
    double value = 1 + (half & 127) / 128.0;
    for (int e = half >> 7; e < 127; ++e) value /= 2;
    return value;
}
constexpr bool zone_rule_holds(const CodeTables& t, int factor, int first, int lowest) {
    constexpr int one = 127 << 7;
    const Line line = t.line[0];
    if (static_cast<int>(value_of_half(lowest) * line.slope + line.offset) != static_cast<int>(line.offset))
        return false;
    for (int half = lowest; half <= one; ++half) {
        const int found = ((half * factor) >> 16) - first;
        const int at_end = half == one ? decades : exact_zone(t, value_of_half(half + 1) * (1 - 1e-9));
        if (found > exact_zone(t, value_of_half(half)) || found < at_end - 1) return false;
    }
    return true;
}
constexpr ZoneTables make_zones(const CodeTables& t) {
    ZoneTables zones{};
    // About one zone in log2(10) binades of 128 steps. Even, since NEON multiplies by twice a number.
    for (int factor = 130; factor < 180; factor += 2) {
        const int first = (((127 << 7) * factor) >> 16) - (decades - 1);
        const int lowest = ((first << 16) + factor - 1) / factor;
        if (!zone_rule_holds(t, factor, first, lowest)) continue;
        zones.factor = factor;
        zones.first = first;
        zones.lowest = static_cast<float>(value_of_half(lowest));
        for (int z = 0; z <= decades; ++z) {
            const int place = (first + z) & 7;
            zones.threshold[place] = z < decades ? t.threshold[z] : __builtin_inff();
            zones.slope[place] = t.line[z].slope;
            zones.offset[place] = t.line[z].offset;
            zones.last[place] = t.line[z].last;
        }
        break;
    }
    return zones;
}
template <Code code>
struct ZonesOf {
    static constexpr ZoneTables all = make_zones(Tables<code>::all);
    static_assert(all.factor != 0, "no linear rule finds the zone of a value");
};

// The magnitude index that DitherTables::last stands for, by the exponent field.
constexpr uint8_t last_index(const DitherTables& t, Code code, int binade) {
    return static_cast<uint8_t>(t.last[binade % 32] + (fixed_point_bits >> 16) - zero_code_of(code));
}

// The tables of dithered rounding by zone, a third of the exponent.
struct alignas(32) DitherZones {
    float slope[8], offset[8];  // modulo 8
    uint8_t last[16];           // modulo 16
};
constexpr DitherZones make_dither_zones(Code code) {
    const DitherTables t = make_dither_tables(code);
    DitherZones made{};
    for (int i = 0; i < zones; ++i) {
        const int binade = lowest_binade + i * binades_of_zone, zone = binade / binades_of_zone;
        made.slope[zone % 8] = t.slope[binade % 32];
        made.offset[zone % 8] = t.offset[binade % 32];
        made.last[zone % 16] = last_index(t, code, binade);
    }
    return made;
}
template <Code code>
struct DitherZonesOf {
    static constexpr DitherZones all = make_dither_zones(code);
};

// What a piece of the inverse of `position` can be told by: the exponents of the position, or without a sign of that
// plus 1, and of this plus 1. Positions in units of 1/256; with a sign, less than a half is taken for that.
template <Code code>
struct Pieces {
    static constexpr float shift = is_signed(code) ? 0.0f : 256.0f, least = 128.0f;
    static constexpr int exponent_of(float x) {
        int exponent = 127;
        for (; x >= 2; x /= 2) ++exponent;
        return exponent;
    }
    static constexpr int lower(int index) {
        const float x = static_cast<float>(index * 256) + shift;
        return exponent_of(x < least ? least : x);
    }
    static constexpr int upper(int index) { return exponent_of(static_cast<float>(index * 256) + shift + 256); }
    static constexpr int count = is_signed(code) ? 129 : 256;
};

// The pieces by the sum of their two exponents, modulo 16.
struct alignas(64) PiecesBySum {
    float slope[16], offset[16];
};
template <Code code>
constexpr PiecesBySum make_pieces_by_sum() {
    PiecesBySum made{};
    for (int i = 0; i < Pieces<code>::count; ++i) {
        const int place = (Pieces<code>::lower(i) + Pieces<code>::upper(i)) % 16;
        made.slope[place] = Decode16TablesOf<code>::all.slope[i];
        made.offset[place] = Decode16TablesOf<code>::all.offset[i];
    }
    return made;
}
template <Code code>
struct PiecesBySumOf {
    static constexpr PiecesBySum all = make_pieces_by_sum<code>();
};
template <Code code>
constexpr bool sums_tell_pieces() {
    for (int i = 0; i < Pieces<code>::count; ++i) {
        const int place = (Pieces<code>::lower(i) + Pieces<code>::upper(i)) % 16;
        if (PiecesBySumOf<code>::all.slope[place] != Decode16TablesOf<code>::all.slope[i] ||
            PiecesBySumOf<code>::all.offset[place] != Decode16TablesOf<code>::all.offset[i])
            return false;
    }
    return true;
}

OPTIM8_END
