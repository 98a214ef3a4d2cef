// The tables of the dynamic code on the device.
#pragma once

#include "core/dither.h"
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
    LaneTable<uint32_t> last;
};
template <Code code>
struct LaneDither : LaneDitherLines {
    static constexpr float lowest = DitherTablesOf<code>::all.lowest;
};

template <Code code>
OPTIM8_DEVICE LaneDitherLines lane_dither_lines() {
    const DitherTables* t;
    if constexpr (is_signed(code))
        t = &signed_dither;
    else
        t = &positive_dither;
    return {{__ldg(t->slope + lane())}, {__ldg(t->offset + lane())}, {__ldg(t->last + lane())}};
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
