// One warp at work: its lanes, tables held by lanes, and the tile of 256 values that a warp reads and writes at a time,
// eight values a lane. All control flow above these is the same in every lane of a warp, so every `_sync` names all 32.
#pragma once

#include "core/row.h"
#include "core/storage.h"
#include "cuda/launch.h"

OPTIM8_BEGIN

constexpr unsigned whole_warp = 0xffffffffu;
constexpr int per_lane = 8;
constexpr int tile = warp_size * per_lane;

OPTIM8_DEVICE int lane() { return static_cast<int>(threadIdx.x) % warp_size; }
OPTIM8_DEVICE int64_t warp_of_grid() {
    return static_cast<int64_t>(blockIdx.x) * warps_per_block + static_cast<int>(threadIdx.x) / warp_size;
}

// A table of 32 entries, one in each lane: a look-up with an index of the lane's own is one shuffle. In memory it would
// be a gather of up to 32 addresses, in constant memory up to 32 reads one after another.
template <class T>
struct LaneTable {
    T mine;
    OPTIM8_DEVICE T operator[](int32_t i) const { return __shfl_sync(whole_warp, mine, i); }
};
// The entry of a binade, as in core/codec.h; a shuffle takes its source modulo 32.
template <class T>
OPTIM8_DEVICE T of_binade(LaneTable<T> table, uint32_t exponent) {
    return table[static_cast<int32_t>(exponent)];
}

// The larger of a magnitude, as bits, and that of x; above infinity where either is NaN.
OPTIM8_DEVICE uint32_t larger_magnitude(uint32_t largest, float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    float larger;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(float_of(largest)), "f"(fabsf(x)));
    return bits_of(larger);
#else
    return maximum(largest, magnitude_bits(x));
#endif
}

OPTIM8_DEVICE uint32_t largest_of_warp(uint32_t x) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    return __reduce_max_sync(whole_warp, x);
#else
    for (int step = warp_size / 2; step > 0; step /= 2) x = maximum(x, __shfl_xor_sync(whole_warp, x, step));
    return x;
#endif
}

// The largest over each run of `lanes` neighbouring lanes, a power of two, in every lane of the run.
OPTIM8_DEVICE uint32_t largest_of_lanes(uint32_t x, int lanes) {
    if (lanes == warp_size) return largest_of_warp(x);
    for (int step = lanes / 2; step > 0; step /= 2) x = maximum(x, __shfl_xor_sync(whole_warp, x, step));
    return x;
}

// Where value k of a lane stands in its tile: runs of `span` neighbouring values a lane. With span values in 16 bytes,
// the lanes of a warp touch neighbouring 16-byte packets.
template <int span>
OPTIM8_DEVICE int place(int k) {
    return k / span * (warp_size * span) + lane() * span + k % span;
}
template <class T>
constexpr int packet_span = sizeof(T) == 4 ? 4 : 8;

template <int bytes>
struct PacketOf;
template <>
struct PacketOf<4> {
    using type = uint32_t;
};
template <>
struct PacketOf<8> {
    using type = uint2;
};
template <>
struct PacketOf<16> {
    using type = uint4;
};
// The widest access for `span` values of type T.
template <class T, int span>
using Packet = typename PacketOf<(sizeof(T) * span < 16 ? sizeof(T) * span : 16)>::type;

template <class T, int span>
OPTIM8_HD bool packed_well(const T* at) {
    return reinterpret_cast<uintptr_t>(at) % sizeof(Packet<T, span>) == 0;
}

// `n` neighbouring values by the widest accesses, their address being a multiple of one. Values are read once, so they
// go past the tables in the cache (__ldcs).
template <int n, class T>
OPTIM8_DEVICE void load_packets(const T* from, T (&to)[n]) {
    using P = Packet<T, n>;
    constexpr int of_packet = sizeof(P) / sizeof(T);
#pragma unroll
    for (int k = 0; k < n; k += of_packet) {
        const P packet = __ldcs(reinterpret_cast<const P*>(from + k));
        std::memcpy(to + k, &packet, sizeof packet);
    }
}

// Where value k of a lane stands from its first on, where k is known when this is compiled.
template <int span>
OPTIM8_HD constexpr int step_to(int k) {
    return k / span * (warp_size * span) + k % span;
}
// The lane's values of a whole tile from its first on, at an address fit for packets: as words, and from values.
template <int span, class T>
OPTIM8_DEVICE void load_words(const T* from, uint32_t (&to)[per_lane * sizeof(T) / 4]) {
    using P = Packet<T, span>;
    constexpr int of_packet = sizeof(P) / sizeof(T);
#pragma unroll
    for (int k = 0; k < per_lane; k += of_packet) {
        const P packet = __ldcs(reinterpret_cast<const P*>(from + step_to<span>(k)));
        std::memcpy(to + k * sizeof(T) / 4, &packet, sizeof packet);
    }
}
template <int span, class T>
OPTIM8_DEVICE void store_words(T* to, const uint32_t (&from)[per_lane * sizeof(T) / 4]) {
    using P = Packet<T, span>;
    constexpr int of_packet = sizeof(P) / sizeof(T);
#pragma unroll
    for (int k = 0; k < per_lane; k += of_packet) {
        P packet;
        std::memcpy(&packet, from + k * sizeof(T) / 4, sizeof packet);
        __stcs(reinterpret_cast<P*>(to + step_to<span>(k)), packet);
    }
}
template <int span, class T>
OPTIM8_DEVICE void store_packets(T* to, const T (&from)[per_lane]) {
    using P = Packet<T, span>;
    constexpr int of_packet = sizeof(P) / sizeof(T);
#pragma unroll
    for (int k = 0; k < per_lane; k += of_packet) {
        P packet;
        std::memcpy(&packet, from + k, sizeof packet);
        __stcs(reinterpret_cast<P*>(to + step_to<span>(k)), packet);
    }
}

// Whether values that are read are read again: then they should stay in the cache.
enum class Reads { Once, Again };

// The lane's values of a tile of which `count` are there; the others become `fill`. `well` says that the tile is whole
// and its address fit for packets.
template <int span, Reads reads = Reads::Once, class T>
OPTIM8_DEVICE void load_tile(const T* from, int count, bool well, T fill, T (&to)[per_lane]) {
    if (well) {
        using P = Packet<T, span>;
        constexpr int of_packet = sizeof(P) / sizeof(T);
#pragma unroll
        for (int k = 0; k < per_lane; k += of_packet) {
            const P* at = reinterpret_cast<const P*>(from + place<span>(k));
            const P packet = reads == Reads::Once ? __ldcs(at) : *at;
            std::memcpy(to + k, &packet, sizeof packet);
        }
    } else {
#pragma unroll
        for (int k = 0; k < per_lane; ++k) to[k] = place<span>(k) < count ? from[place<span>(k)] : fill;
    }
}

template <int span, class T>
OPTIM8_DEVICE void store_tile(T* to, int count, bool well, const T (&from)[per_lane]) {
    if (well) {
        using P = Packet<T, span>;
        constexpr int of_packet = sizeof(P) / sizeof(T);
#pragma unroll
        for (int k = 0; k < per_lane; k += of_packet) {
            P packet;
            std::memcpy(&packet, from + k, sizeof packet);
            __stcs(reinterpret_cast<P*>(to + place<span>(k)), packet);
        }
    } else {
#pragma unroll
        for (int k = 0; k < per_lane; ++k)
            if (place<span>(k) < count) to[place<span>(k)] = from[k];
    }
}

// The lane's values of a tile as they were read. Those of 16 bits stay packed until they are needed.
template <class T>
struct LaneWords {
    uint32_t word[per_lane * sizeof(T) / 4];
    OPTIM8_DEVICE float operator[](int k) const {
        if constexpr (sizeof(T) == 4)
            return float_of(word[k]);
        else
            return to_float(T{static_cast<uint16_t>(word[k / 2] >> 16 * (k % 2))});
    }
};

// The lane's eight bytes of a whole tile whose address is fit for packets, as two words; spans as for load_tile.
template <int span>
OPTIM8_DEVICE void load_bytes(const uint8_t* from, uint32_t (&words)[per_lane / 4]) {
    if constexpr (span == per_lane) {
        const uint2 packet = __ldcs(reinterpret_cast<const uint2*>(from + place<span>(0)));
        words[0] = packet.x;
        words[1] = packet.y;
    } else {
        for (int i = 0; i < 2; ++i) words[i] = __ldcs(reinterpret_cast<const uint32_t*>(from + place<span>(4 * i)));
    }
}
template <int span>
OPTIM8_DEVICE void store_bytes(uint8_t* to, const uint32_t (&words)[per_lane / 4]) {
    if constexpr (span == per_lane) {
        __stcs(reinterpret_cast<uint2*>(to + place<span>(0)), uint2{words[0], words[1]});
    } else {
        for (int i = 0; i < 2; ++i) __stcs(reinterpret_cast<uint32_t*>(to + place<span>(4 * i)), words[i]);
    }
}
OPTIM8_DEVICE uint32_t byte_of(const uint32_t (&words)[per_lane / 4], int k) {
    return __byte_perm(words[k / 4], 0, 0x4440 + k % 4);
}
// Eight pairs of an upper and a lower byte, two pairs a word; and back.
OPTIM8_DEVICE void join_pairs(const uint32_t (&upper)[per_lane / 4], const uint32_t (&lower)[per_lane / 4],
                              uint32_t (&pairs)[per_lane / 2]) {
    for (int i = 0; i < per_lane / 2; ++i)
        pairs[i] = __byte_perm(lower[i / 2], upper[i / 2], i % 2 == 0 ? 0x5140 : 0x7362);
}
OPTIM8_DEVICE void part_pairs(const uint32_t (&pairs)[per_lane / 2], uint32_t (&upper)[per_lane / 4],
                              uint32_t (&lower)[per_lane / 4]) {
    for (int i = 0; i < per_lane / 4; ++i) {
        upper[i] = __byte_perm(pairs[2 * i], pairs[2 * i + 1], 0x7531);
        lower[i] = __byte_perm(pairs[2 * i], pairs[2 * i + 1], 0x6420);
    }
}
// Byte `which` of eight words.
template <int which>
OPTIM8_DEVICE void pack_bytes(const uint32_t (&bytes)[per_lane], uint32_t (&words)[per_lane / 4]) {
    constexpr int pair = 0x40 + 0x11 * which;
    for (int i = 0; i < 2; ++i)
        words[i] = __byte_perm(__byte_perm(bytes[4 * i], bytes[4 * i + 1], pair),
                               __byte_perm(bytes[4 * i + 2], bytes[4 * i + 3], pair), 0x5410);
}

// Half `which` of eight words.
template <int which>
OPTIM8_DEVICE void pack_halves(const uint32_t (&halves)[per_lane], uint32_t (&words)[per_lane / 2]) {
    for (int i = 0; i < per_lane / 2; ++i)
        words[i] = __byte_perm(halves[2 * i], halves[2 * i + 1], which == 0 ? 0x5410 : 0x7632);
}

// As __byte_perm, and a nibble of 8 more stands for the sign of its byte, 0xff or 0.
#if defined(__CUDACC__)
OPTIM8_DEVICE uint32_t permute_signed(uint32_t low, uint32_t high, uint32_t selector) {
    uint32_t bytes;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selector));
    return bytes;
}
#endif
// For the signs of two floats, as bits, two bytes 0xff or 0.
OPTIM8_DEVICE uint32_t sign_bytes(uint32_t a, uint32_t b) { return permute_signed(a, b, 0x00fb); }
// The same of two halves of a word.
OPTIM8_DEVICE uint32_t sign_halves(uint32_t a, uint32_t b) { return permute_signed(a, b, 0xffbb); }

// Two numbers as float16, rounded towards 0, the first in the lower half.
#if defined(__CUDACC__)
OPTIM8_DEVICE uint32_t half_pair(float low, float high) {
    uint32_t pair;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rz.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
    asm("{.reg .b16 a, b; cvt.rz.f16.f32 a, %1; cvt.rz.f16.f32 b, %2; mov.b32 %0, {b, a};}"
        : "=r"(pair)
        : "f"(high), "f"(low));
#endif
    return pair;
}
#endif

// What nvcc then takes for a number of its own, not to be made again from those that it was made from.
#if defined(__CUDACC__)
OPTIM8_DEVICE void keep_in_register(uint32_t& x) { asm volatile("" : "+r"(x)); }
OPTIM8_DEVICE void keep_in_register(float& x) { asm("" : "+f"(x)); }
#endif

// Eight codes of magnitudes, as byte 2 of words, with the signs of x: those of x and -x add up to 254.
OPTIM8_DEVICE void pack_signed(const uint32_t (&codes)[per_lane], const float (&x)[per_lane],
                               uint32_t (&words)[per_lane / 4]) {
    pack_bytes<2>(codes, words);
    for (int i = 0; i < 2; ++i) {
        const uint32_t negative = __byte_perm(sign_bytes(bits_of(x[4 * i]), bits_of(x[4 * i + 1])),
                                              sign_bytes(bits_of(x[4 * i + 2]), bits_of(x[4 * i + 3])), 0x5410);
        words[i] = (negative & (0xfefefefeu - words[i])) | (~negative & words[i]);
    }
}

// How many values of `size` a tile that begins at `at` has, at most 256.
OPTIM8_DEVICE int values_in_tile(int64_t size, int64_t at) {
    return size - at < tile ? static_cast<int>(size - at) : tile;
}

// The tiles of `size` values.
inline int64_t tiles_of(int64_t size) { return size / tile + (size % tile != 0); }

// The length of the blocks that have one absmax. Most often it is a power of two, and then nothing need be divided by
// it, which takes as long as decoding several values.
struct BlockLength {
    int64_t values;
    int shift = -1;  // values are 2^shift; -1: no power of two

    explicit BlockLength(int64_t values) : values(values) {
        for (int s = 0; s < 63; ++s)
            if (values == int64_t{1} << s) shift = s;
    }
    OPTIM8_DEVICE int64_t block_of(int64_t i) const { return shift >= 0 ? i >> shift : i / values; }
    // Whether the `n` values from any multiple of n on, a power of two, are of one block.
    OPTIM8_DEVICE bool holds_runs_of(int n) const { return shift >= 0 && n <= values; }
    // Whether a tile is made of whole blocks, and each of them of the values of whole lanes.
    OPTIM8_HD bool divides_tiles() const { return shift >= 0 && values <= tile && values >= per_lane; }
};

OPTIM8_END
