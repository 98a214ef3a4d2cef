// Quantization by blocks for any encoder: block maximum, then a code for each value. A warp takes a tile of 256 values
// where a block is at most that long (and a power of two), else a whole block, which it reads twice.
#pragma once

#include "core/codec.h"
#include "cuda/lanes.h"

OPTIM8_BEGIN

// An Encoder has: `bits` of a code, and code(x, scale, reciprocal) of any value x, called by all lanes together.

template <int bits>
OPTIM8_DEVICE void store_codes(uint8_t* to, int count, const uint8_t (&codes)[per_lane]) {
    if constexpr (bits == 8) {
        store_tile<per_lane>(to, count, count == tile && packed_well<uint8_t, per_lane>(to), codes);
    } else {
        // Two codes a byte, the first in the high nibble; a lane's eight are four bytes.
        constexpr int bytes = per_lane / 2;
        uint8_t pairs[bytes];
        for (int i = 0; i < bytes; ++i) pairs[i] = static_cast<uint8_t>(codes[2 * i] << 4 | codes[2 * i + 1]);
        uint8_t* at = to + lane() * bytes;
        if (count == tile && packed_well<uint8_t, bytes>(to)) {
            uint32_t packet;
            std::memcpy(&packet, pairs, sizeof packet);
            __stcs(reinterpret_cast<uint32_t*>(at), packet);
        } else {
            for (int i = 0; i < bytes; ++i)
                if (lane() * per_lane + 2 * i < count) at[i] = pairs[i];
        }
    }
}

template <class T>
OPTIM8_DEVICE void load_floats(const T* from, int count, float (&to)[per_lane]) {
    T raw[per_lane];
    load_tile<per_lane>(from, count, count == tile && packed_well<T, per_lane>(from), T{}, raw);
#pragma unroll
    for (int k = 0; k < per_lane; ++k) to[k] = to_float(raw[k]);
}

// The largest magnitude of the lane's values; `finite` leaves out what is not.
OPTIM8_DEVICE uint32_t largest_of_values(const float (&values)[per_lane], bool finite) {
    uint32_t largest = 0;
#pragma unroll
    for (int k = 0; k < per_lane; ++k)
        largest = larger_magnitude(largest, finite && !is_finite(values[k]) ? 0.0f : values[k]);
    return largest;
}

template <class Encoder>
OPTIM8_DEVICE void encode_tile(const Encoder& encoder, const float (&values)[per_lane], Normalizer normal, uint8_t* to,
                               int count) {
    uint8_t codes[per_lane];
#pragma unroll
    for (int k = 0; k < per_lane; ++k) codes[k] = encoder.code(values[k], normal.scale, normal.reciprocal);
    store_codes<Encoder::bits>(to, count, codes);
}

// How many warps quantize_warp wants.
inline int64_t quantize_warps(int64_t size, int64_t blocksize) {
    const bool by_tiles = blocksize <= tile && tile % blocksize == 0 && blocksize % per_lane == 0;
    const int64_t each = by_tiles ? tile : blocksize;
    return size / each + (size % each != 0);
}

template <class Encoder, class T>
OPTIM8_DEVICE void quantize_warp(const Encoder& encoder, const T* values, uint8_t* codes, float* absmax, int64_t size,
                                 int64_t blocksize) {
    float x[per_lane];
    if (blocksize <= tile && tile % blocksize == 0 && blocksize % per_lane == 0) {
        const int64_t at = warp_of_grid() * tile;
        if (at >= size) return;
        const int count = values_in_tile(size, at);
        const int lanes = static_cast<int>(blocksize) / per_lane;
        load_floats(values + at, count, x);
        uint32_t largest = largest_of_lanes(largest_of_values(x, false), lanes);
        if (__any_sync(whole_warp, largest >= inf_bits)) largest = largest_of_lanes(largest_of_values(x, true), lanes);
        encode_tile(encoder, x, normalizer(float_of(largest)), codes + at * Encoder::bits / 8, count);
        if (lane() % lanes == 0 && lane() * per_lane < count)
            absmax[at / blocksize + lane() / lanes] = float_of(largest);
        return;
    }
    const int64_t block = warp_of_grid(), begin = block * blocksize;
    if (begin >= size) return;
    const int64_t end = begin + blocksize < size ? begin + blocksize : size;
    uint32_t largest = 0;
    for (int pass = 0; pass < 2; ++pass) {
        // The second time only where the block holds something that is not finite.
        if (pass == 1 && largest < inf_bits) break;
        largest = 0;
        for (int64_t at = begin; at < end; at += tile) {
            load_floats(values + at, values_in_tile(end, at), x);
            largest = maximum(largest, largest_of_values(x, pass == 1));
        }
        largest = largest_of_lanes(largest, warp_size);
    }
    const Normalizer normal = normalizer(float_of(largest));
    for (int64_t at = begin; at < end; at += tile) {
        const int count = values_in_tile(end, at);
        load_floats(values + at, count, x);
        encode_tile(encoder, x, normal, codes + at * Encoder::bits / 8, count);
    }
    if (lane() == 0) absmax[block] = float_of(largest);
}

OPTIM8_END
