// The weights of a whole block whose parameters are bfloat16 and whose rounding is completed or dithered
// (core/weight.h), eight to a lane, on the way that nearly all blocks take.
#pragma once

#include "core/weight.h"
#include "cuda/lanes.h"

OPTIM8_BEGIN

// How the lane's weights are kept. Here there is nothing beside the parameters: they are plain, or float16, whose
// weights have an exponent of their own.
template <class P, bool wide>
struct LaneWeights {
    static constexpr bool completes = false;
    OPTIM8_DEVICE void load_low(Weight, const void*, int64_t) {}
    OPTIM8_DEVICE void join(Weight, float (&)[per_lane]) const {}
    OPTIM8_DEVICE static bool are_numbers(const float (&)[per_lane]) { return true; }
    OPTIM8_DEVICE static void store(Weight, const float (&param)[per_lane], uint32_t, P* to, void*, int64_t) {
        P narrow[per_lane];
#pragma unroll
        for (int k = 0; k < per_lane; ++k) narrow[k] = from_float<P>(param[k]);
        store_tile<packet_span<P>>(to, tile, true, narrow);
    }
};
template <>
struct LaneWeights<bfloat16, true> {
    static constexpr bool completes = true;
    static constexpr int span = packet_span<bfloat16>;
    static_assert(span == per_lane, "a lane's weights are neighbours");
    uint32_t low[per_lane / 2];  // as they are stored

    // `low_of_row`: where those of the tensor begin; `begin`: of the block there.
    OPTIM8_DEVICE void load_low(Weight weight, const void* low_of_row, int64_t begin) {
        if (weight == Weight::Bits32) {
            load_words<span>(static_cast<const int16_t*>(low_of_row) + begin + place<span>(0), low);
        } else if (weight == Weight::Bits24) {
            uint32_t bytes[per_lane / 4];
            load_bytes<span>(static_cast<const uint8_t*>(low_of_row) + begin, bytes);
            for (int i = 0; i < per_lane / 4; ++i) low[i] = bytes[i];
        }
    }
    // Adds them to the parameters. Beside a 0 negative ones are not its own (join_weight); they make a NaN of it, which
    // stays one over the step, so that are_numbers tells.
    OPTIM8_DEVICE void join(Weight weight, float (&param)[per_lane]) const {
        // low_of, in one instruction: the half with its sign, and the byte with its sign above a 0.
        if (weight == Weight::Bits32) {
#pragma unroll
            for (int k = 0; k < per_lane; ++k)
                param[k] = float_of(bits_of(param[k]) + permute_signed(low[k / 2], 0, k % 2 == 0 ? 0x9910 : 0xbb32));
        } else if (weight == Weight::Bits24) {
#pragma unroll
            for (int k = 0; k < per_lane; ++k)
                param[k] = float_of(bits_of(param[k]) + permute_signed(low[k / 4], 0, 0x8804 + k % 4 * 0x1110));
        }
    }
    // The bits of a NaN are not those of a weight.
    OPTIM8_DEVICE static bool are_numbers(const float (&param)[per_lane]) {
        bool all = true;
#pragma unroll
        for (int k = 0; k < per_lane; k += 2)  // two in one comparison
            all = all && (param[k] == param[k] && param[k + 1] == param[k + 1]);
        return all;
    }
    // Stores the weights of a block. `start`: the dither of the lane's first.
    OPTIM8_DEVICE static void store(Weight weight, const float (&param)[per_lane], uint32_t start, bfloat16* to,
                                    void* low_of_row, int64_t begin) {
        // Of each keep_weight and, as param_of_weight adds it, half a unit of the parameter: then that is the upper
        // half.
        uint32_t kept[per_lane];
        if (weight == Weight::Bits32) {
            uint32_t low[per_lane / 2];
#pragma unroll
            for (int k = 0; k < per_lane; ++k) kept[k] = bits_of(param[k]);
            pack_halves<0>(kept, low);
            store_words<span>(static_cast<int16_t*>(low_of_row) + begin + place<span>(0), low);
#pragma unroll
            for (uint32_t& each : kept) each += half_of_param;
        } else if (weight == Weight::Bits24) {
            // The dither and that half are one number, in one instruction with the addition.
#pragma unroll
            for (int k = 0; k < per_lane; ++k) kept[k] = bits_of(param[k]) + funnel<8>(half_of_param >> 8, u(start, k));
            uint32_t low[per_lane / 4];
            pack_bytes<1>(kept, low);
            for (uint32_t& each : low) each ^= 0x80808080u;  // without that half: a carry has gone to the parameter
            store_bytes<span>(static_cast<uint8_t*>(low_of_row) + begin, low);
        } else {
#pragma unroll
            for (int k = 0; k < per_lane; ++k) kept[k] = bits_of(param[k]) + (u(start, k) >> 16);
        }
        uint32_t words[per_lane / 2];
        pack_halves<1>(kept, words);
        store_words<span>(to + place<span>(0), words);
    }

  private:
    OPTIM8_DEVICE static uint32_t u(uint32_t start, int k) {
        return dither<dither_of_param>(start, static_cast<uint32_t>(k));
    }
};

OPTIM8_END
