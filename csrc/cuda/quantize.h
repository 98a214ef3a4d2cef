// Quantization by blocks for any encoder: block maximum, then a code for each value. A warp takes a tile of 256 values
// where a block is at most that long (and a power of two), else a whole block, which it reads twice, or with the other
// warps of its thread block a part of one.
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

template <Reads reads = Reads::Once, class T>
OPTIM8_DEVICE void load_floats(const T* from, int count, float (&to)[per_lane]) {
    T raw[per_lane];
    load_tile<per_lane, reads>(from, count, count == tile && packed_well<T, per_lane>(from), T{}, raw);
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

// How many warps quantize a block that is no part of a tile. Each looks for the block's maximum, since they share no
// memory, and encodes its part of the block. A block beyond 8 KiB is shared: so the blocks that a multiprocessor has in
// work fit into its cache, where each of their values is read several times.
template <class T>
OPTIM8_HD int warps_of_block(BlockLength blocks) {
    return blocks.values * static_cast<int64_t>(sizeof(T)) > 8192 ? warps_per_block : 1;
}

// How many warps quantize_warp wants.
template <class T>
int64_t quantize_warps(int64_t size, BlockLength blocks) {
    if (blocks.divides_tiles()) return tiles_of(size);
    return blocks_of(size, blocks.values) * warps_of_block<T>(blocks);
}

template <class Encoder, class T>
OPTIM8_DEVICE void quantize_warp(const Encoder& encoder, const T* values, uint8_t* codes, float* absmax, int64_t size,
                                 BlockLength blocks) {
    float x[per_lane];
    if (blocks.divides_tiles()) {
        const int64_t at = warp_of_grid() * tile;
        if (at >= size) return;
        const int count = values_in_tile(size, at), mine = lane() * per_lane;
        const int length = 1 << blocks.shift;
        load_floats(values + at, count, x);
        uint32_t largest = largest_of_lanes(largest_of_values(x, false), length / per_lane);
        if (__any_sync(whole_warp, largest >= inf_bits))
            largest = largest_of_lanes(largest_of_values(x, true), length / per_lane);
        encode_tile(encoder, x, normalizer(float_of(largest)), codes + at * Encoder::bits / 8, count);
        if ((mine & (length - 1)) == 0 && mine < count) absmax[blocks.block_of(at + mine)] = float_of(largest);
        return;
    }
    const int sharers = warps_of_block<T>(blocks);
    const int64_t block = sharers == 1 ? warp_of_grid() : warp_of_grid() / warps_per_block;
    const int part = sharers == 1 ? 0 : static_cast<int>(warp_of_grid() % warps_per_block);
    const int64_t begin = block * blocks.values;
    if (begin >= size) return;
    const int64_t end = begin + blocks.values < size ? begin + blocks.values : size;
    uint32_t largest = 0;
    for (int pass = 0; pass < 2; ++pass) {
        // The second time only where the block holds something that is not finite.
        if (pass == 1 && largest < inf_bits) break;
        largest = 0;
        for (int64_t at = begin; at < end; at += tile) {
            load_floats<Reads::Again>(values + at, values_in_tile(end, at), x);
            largest = maximum(largest, largest_of_values(x, pass == 1));
        }
        largest = largest_of_lanes(largest, warp_size);
    }
    const Normalizer normal = normalizer(float_of(largest));
    for (int64_t at = begin + part * tile; at < end; at += sharers * tile) {
        const int count = values_in_tile(end, at);
        load_floats(values + at, count, x);
        encode_tile(encoder, x, normal, codes + at * Encoder::bits / 8, count);
    }
    if (part == 0 && lane() == 0) absmax[block] = float_of(largest);
}

OPTIM8_END
