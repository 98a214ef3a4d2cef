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
OPTIM8_DEVICE float decode(uint8_t index) {
    return __ldg(device_tables<code>().value + index);
}

// The encoder's 32 binades, one in each lane; stands for CodeTables in core/codec.h's encode.
struct LaneCode {
    LaneTable<uint32_t> carry;
    LaneTable<float> slope, offset;
    LaneTable<int32_t> last;
};
template <Code code>
OPTIM8_DEVICE LaneCode lane_code() {
    const CodeTables& t = device_tables<code>();
    return LaneCode{
        {__ldg(t.carry + lane())}, {__ldg(t.slope + lane())}, {__ldg(t.offset + lane())}, {__ldg(t.last + lane())}};
}

OPTIM8_END
