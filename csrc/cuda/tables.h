// The tables of the dynamic code on the device.
#pragma once

#include "core/code16.h"
#include "cuda/lanes.h"

OPTIM8_BEGIN

// Values by code are read from memory through the cache: 1 KiB a code, one gather a look-up.
static __device__ const CodeTables signed_tables = make_tables(Code::Signed);
static __device__ const CodeTables unsigned_tables = make_tables(Code::Unsigned);
static __device__ const CodeTables positive_tables = make_tables(Code::Positive);

template <Code code>
OPTIM8_DEVICE const CodeTables& device_tables() {
    if constexpr (code == Code::Signed) {
        return signed_tables;
    } else if constexpr (code == Code::Unsigned) {
        return unsigned_tables;
    } else {
        return positive_tables;
    }
}

template <Code code>
OPTIM8_DEVICE float decode(uint32_t index) {
    return __ldg(device_tables<code>().value + index);
}

// The encoder's 32 binades, one in each lane; stands for CodeTables in core/codec.h's on_line.
struct LaneLines {
    LaneTable<uint32_t> carry;
    LaneTable<float> slope, offset, last;
};
template <Code code>
struct LaneCode : LaneLines {};

template <Code code>
OPTIM8_DEVICE LaneCode<code> lane_code() {
    const CodeTables& t = device_tables<code>();
    return LaneCode<code>{LaneLines{{__ldg(t.carry + lane())},
                                    {__ldg(t.slope + lane())},
                                    {__ldg(t.offset + lane())},
                                    {static_cast<float>(__ldg(t.last + lane()))}}};
}

static __device__ const DitherTables signed_dither = make_dither_tables(Code::Signed);
static __device__ const DitherTables positive_dither = make_dither_tables(Code::Positive);

// The encoder of dithered rounding, likewise; stands for DitherTables.
struct LaneDitherLines {
    LaneTable<float> slope, offset;
    LaneTable<uint32_t> last, last16;
};
template <Code code>
struct LaneDither : LaneDitherLines {
    static constexpr float lowest = DitherTablesOf<code>::all.lowest, lowest16 = DitherTablesOf<code>::all.lowest16;
};

template <Code code>
OPTIM8_DEVICE LaneDitherLines lane_dither_lines() {
    const DitherTables* t;
    if constexpr (is_signed(code))
        t = &signed_dither;
    else
        t = &positive_dither;
    return {{__ldg(t->slope + lane())},
            {__ldg(t->offset + lane())},
            {__ldg(t->last + lane())},
            {__ldg(t->last16 + lane())}};
}

// core/code16.h's lines of a position; slope and offset are one access.
struct alignas(8) PositionLine {
    float slope, offset;
};
// With a sign by the index of the position. Without by half cells of it: 0 is alone in the first, and has a line of its
// own.
template <int size>
struct PositionLines {
    PositionLine line[size];
};
constexpr int half_cells = 2 * code_size;
constexpr PositionLines<code_size> make_signed_lines() {
    const Decode16Tables t = make_decode16_tables(Code::Signed);
    PositionLines<code_size> lines{};
    for (int i = 0; i < code_size; ++i) lines.line[i] = {t.slope[i], t.offset[i]};
    return lines;
}
constexpr PositionLines<half_cells> make_positive_lines() {
    const Decode16Tables t = make_decode16_tables(Code::Positive);
    PositionLines<half_cells> lines{};
    for (int i = 1; i < half_cells; ++i) lines.line[i] = {t.slope[i / 2], t.offset[i / 2]};
    return lines;
}
static __device__ const PositionLines<code_size> signed_lines = make_signed_lines();
static __device__ const PositionLines<half_cells> positive_lines = make_positive_lines();

// core/code16.h's decode16 of a number as the mantissa of 2^23 + number, a float without a conversion.
constexpr float mantissa_unit = 0x1p23f;
constexpr uint32_t mantissa_unit_bits = 0x4b000000u;
template <Code code>
OPTIM8_DEVICE float decode16_lane(uint32_t mantissa) {
    const float place = float_of(mantissa) - (mantissa_unit + static_cast<float>(zero16_of(code)));
    if constexpr (is_signed(code)) {
        const uint32_t index = __byte_perm(bits_of(fabsf(place) + mantissa_unit), 0, 0x4441);
        const float2 line = __ldg(reinterpret_cast<const float2*>(signed_lines.line + index));
        // That of -place with the other sign.
        return fma(place, line.x, float_of(bits_of(line.y) ^ (bits_of(place) & ~abs_mask)));
    } else {
        const uint32_t index = __byte_perm(bits_of(fma(place, 2.0f, mantissa_unit)), 0, 0x4421);
        const float2 line = __ldg(reinterpret_cast<const float2*>(positive_lines.line + index));
        return fma(place, line.x, line.y);
    }
}

// core/codec.h's encode of a finite x, called by all lanes together; the code is the lowest byte. An addition to 2^23
// that rounds towards one side truncates, takes the sign in, and leaves an integer in the lowest bits.
template <Code code>
OPTIM8_DEVICE uint32_t encode_lane(float x, float reciprocal, const LaneCode<code>& t) {
    constexpr float unit = 0x1p23f;
    const float y = x * reciprocal;
    if constexpr (is_signed(code)) {
        // 127 + a rounded down, or -(127 - a) rounded down. There is no -1: -(127 - 128) would be index 0.
        const float signed_index = __fadd_rd(on_line(fabsf(y), t), copysignf(unit + 127.0f, y));
        return bits_of(maximum(fabsf(signed_index), unit));
    } else {
        // A factor of 0 is the code 0 of Positive.
        const float factor = code == Code::Positive && !(x > 0.0f) ? 0.0f : 1.0f;
        return bits_of(__fmaf_rz(on_line(y, t), factor, unit));
    }
}

OPTIM8_END
