// The tables of the dynamic code on the device.
#pragma once

#include "core/codec.h"
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
constexpr uint8_t zero_code = code == Code::Signed ? 127 : 0;

template <Code code>
OPTIM8_DEVICE float decode(uint32_t index) {
    return __ldg(device_tables<code>().value + index);
}

// The encoder's 32 binades, one in each lane; stands for CodeTables in core/codec.h's on_line. `last` needs no look-up:
// with n cells in a decade, offset is 8 n / 9 - shift and last is 2 n - 1 - shift, so last is a multiple of offset.
struct LaneLines {
    LaneTable<uint32_t> carry;
    LaneTable<float> slope, offset;
};
template <Code code>
struct LaneCode : LaneLines {};

template <Code code>
constexpr float last_shift = code == Code::Signed ? -0.5f : 0.75f;
// Where all is 0, an offset that is above 0, but not as much as 1.
OPTIM8_HD constexpr float lane_offset(float offset, int32_t last) { return last == 0 ? 0.25f : offset; }

template <Code code>
OPTIM8_DEVICE float last_on_line(const LaneCode<code>&, uint32_t, float offset) {
    return fma(offset, 2.25f, last_shift<code>);
}
template <Code code>
constexpr bool last_needs_no_lookup() {
    for (const Line& line : Tables<code>::all.line) {
        const float offset = lane_offset(line.offset, line.last);
        const double last = offset * 2.25 + last_shift<code>;
        const bool flat = line.slope == 0.0f;
        if (flat ? static_cast<int32_t>(offset) != line.last || last < line.last
                 : last < line.last + 0.1 || last > line.last + 0.9)
            return false;
    }
    return true;
}
static_assert(last_needs_no_lookup<Code::Signed>() && last_needs_no_lookup<Code::Unsigned>() &&
              last_needs_no_lookup<Code::Positive>());

template <Code code>
OPTIM8_DEVICE LaneCode<code> lane_code() {
    const CodeTables& t = device_tables<code>();
    const float offset = lane_offset(__ldg(t.offset + lane()), __ldg(t.last + lane()));
    return LaneCode<code>{LaneLines{{__ldg(t.carry + lane())}, {__ldg(t.slope + lane())}, {offset}}};
}

// core/codec.h's encode of a finite x, called by all lanes together; the code is the lowest byte. An addition to 2^23
// that rounds towards one side truncates, takes the sign in, and leaves an integer in the lowest bits.
template <Code code>
OPTIM8_DEVICE uint32_t encode_lane(float x, float reciprocal, const LaneCode<code>& t) {
    constexpr float unit = 0x1p23f;
    const float y = x * reciprocal;
    if constexpr (code == Code::Signed) {
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
