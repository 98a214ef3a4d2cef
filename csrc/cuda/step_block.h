// A block of a step, 256 values of one tensor, and the way that nearly all of them take.
#pragma once

#include "cuda/quick.h"
#include "cuda/tables.h"
#include "cuda/weights.h"

#include <utility>

OPTIM8_BEGIN

template <bool has_norms>
struct RowNorms {};
template <>
struct RowNorms<true> {
    double* of_blocks;  // as in Row
};

// Bits of StepRow::packed. One gradient that begins anywhere does not make the others slow. A parameter goes with its
// low bits.
enum Packed : uint8_t { packed_states = 1, packed_param = 2, packed_grad = 4 };
constexpr uint8_t all_packed = packed_states | packed_param | packed_grad;

// A row as the kernels of one rule take it: the fewer states, the more rows a launch has.
template <class Rule>
struct StepRow : RowNorms<Rule::has_norms> {
    void* param;
    const void* grad;
    void* param_low;  // as in Row
    void* state[state_count<Rule>];
    uint8_t* low[state_count<Rule>];
    float* absmax[state_count<Rule>];
    int64_t size;
    int32_t scalars;                       // index
    uint32_t first_block, first_in_block;  // in the whole parameter
    Precision precision;
    Weight weight;
    uint8_t packed;  // Packed: whose addresses fit packets of 16 bytes

    OPTIM8_HD bool fits_columns() const {
        return precision == Precision::Bits8 && weight == Weight::Plain && packed == all_packed;
    }
};

template <int s>
struct StateIndex {
    static constexpr int index = s;
};
template <class Rule, class Work, int... s>
OPTIM8_DEVICE void each_state(const Work& work, std::integer_sequence<int, s...>) {
    (work(StateIndex<s>{}), ...);
}
// work(s) for every state, s.index being a constant.
template <class Rule, class Work>
OPTIM8_DEVICE void each_state(const Work& work) {
    each_state<Rule>(work, std::make_integer_sequence<int, state_count<Rule>>{});
}

// The encoder of one state, loaded once for all blocks of a warp: of one value, and of the lane's eight into words.
// `s`: which state of its rule it is; `root`: its values are square roots.
template <Code code, int s, Rounding rounding, bool low_bytes, bool root>
struct LaneState;

template <Code code, int s, bool root>
struct LaneState<code, s, Rounding::Nearest, false, root> {
    LaneLines lines = lane_code<code>();
    OPTIM8_DEVICE uint32_t encode(float x, float reciprocal, uint32_t) const {
        return encode_lane(x, reciprocal, LaneCode<code>{lines}) & 0xffu;
    }
    template <int span>
    OPTIM8_DEVICE void encode(const float (&x)[per_lane], float reciprocal, uint32_t, uint32_t (&words)[2],
                              uint32_t (&)[2]) const {
        const LaneCode<code> by{lines};
        uint32_t codes[per_lane];
#pragma unroll
        for (int k = 0; k < per_lane; ++k) codes[k] = encode_lane(x[k], reciprocal, by);
        pack_bytes<0>(codes, words);
    }
};

// core/dither.h's u of the lane's first element of a block, and from it that of the k-th.
template <int span>
OPTIM8_DEVICE uint32_t lane_dither_start(uint32_t block, uint32_t time) {
    return dither_start(block, time) + static_cast<uint32_t>(place<span>(0)) * dither_of_element;
}
template <int state, int span>
OPTIM8_DEVICE uint32_t lane_dither(uint32_t start, int k) {
    static_assert(span % 4 == 0 && state < 4, "neighbours are of one lane");
    return dither<state>(start, static_cast<uint32_t>(place<span>(k) - place<span>(0)));
}

template <Code code, int s, bool root>
struct LaneState<code, s, Rounding::Dithered, false, root> {
    LaneDitherLines lines = lane_dither_lines<code>();
    OPTIM8_DEVICE uint32_t encode(float x, float reciprocal, uint32_t u) const {
        return encode_dithered<code, root>(x, reciprocal, u, LaneDither<code>{lines}) >> 16 & 0xffu;
    }
    template <int span>
    OPTIM8_DEVICE void encode(const float (&x)[per_lane], float reciprocal, uint32_t start, uint32_t (&words)[2],
                              uint32_t (&)[2]) const {
        const LaneDither<code> t{lines};
        uint32_t codes[per_lane];
#pragma unroll
        for (int k = 0; k < per_lane; ++k) {
            const uint32_t u = lane_dither<s, span>(start, k);
            codes[k] = is_signed(code) ? encode_magnitude<code>(x[k], reciprocal, u, t)
                                       : encode_dithered<code, root>(x[k], reciprocal, u, t);
        }
        if constexpr (is_signed(code))
            pack_signed(codes, x, words);
        else
            pack_bytes<2>(codes, words);
    }
};

// A state in 16 bits: codes and low bytes.
template <Code code, int s, Rounding rounding, bool root>
struct LaneState<code, s, rounding, true, root> {
    LaneDitherLines lines = lane_dither_lines<code>();
    OPTIM8_DEVICE uint32_t encode(float x, float reciprocal, uint32_t u) const {
        return encode16<code>(x, reciprocal, rounding == Rounding::Dithered ? u : u_of_nearest,
                              LaneDither<code>{lines});
    }
    OPTIM8_DEVICE uint32_t encode_size(float x, float reciprocal, uint32_t u) const {
        return encode16_magnitude<code>(x, reciprocal, rounding == Rounding::Dithered ? u : u_of_nearest,
                                        LaneDither<code>{lines});
    }
    template <int span>
    OPTIM8_DEVICE void encode(const float (&x)[per_lane], float reciprocal, uint32_t start, uint32_t (&words)[2],
                              uint32_t (&low)[2]) const {
        uint32_t pairs[per_lane / 2];
#pragma unroll
        for (int i = 0; i < per_lane / 2; ++i) {
            const int k = 2 * i;
            pairs[i] = __byte_perm(encode_size(x[k], reciprocal, lane_dither<s, span>(start, k)),
                                   encode_size(x[k + 1], reciprocal, lane_dither<s, span>(start, k + 1)), 0x6521);
            if constexpr (is_signed(code)) {
                const uint32_t negative = sign_halves(bits_of(x[k]), bits_of(x[k + 1]));
                const uint32_t mirrored = 2 * zero16_of(code) * 0x10001u - pairs[i];  // no half borrows
                pairs[i] = (negative & mirrored) | (~negative & pairs[i]);
            }
        }
        part_pairs(pairs, words, low);
    }
};

// Those of the states of a rule from state `s` on.
template <class Rule, class Coding, int s = 0, bool none = s == state_count<Rule>>
struct LaneStates {
    LaneState<code_of<Rule, s>, s, Coding::rounding, Coding::template low<Rule, s>, Coding::template root<Rule, s>>
        first;
    LaneStates<Rule, Coding, s + 1> rest;
    template <int index>
    OPTIM8_DEVICE const auto& of() const {
        if constexpr (index == s)
            return first;
        else
            return rest.template of<index>();
    }
};
template <class Rule, class Coding, int s>
struct LaneStates<Rule, Coding, s, true> {};

// A block and where it lies.
template <class Rule, class P, class G>
struct Block {
    P* param;
    const G* grad;
    uint8_t* codes[state_count<Rule>];
    uint8_t* low[state_count<Rule>];
    float* absmax[state_count<Rule>];
    void* param_low;  // of the whole row, of which the block begins at:
    int64_t begin;
    uint32_t first_in_block;
    Weight weight;
    int count;
    uint32_t number;  // in the whole parameter
    int packed;       // of a whole block StepRow::packed, else 0

    OPTIM8_DEVICE bool well() const { return packed == all_packed; }
    OPTIM8_DEVICE bool well(Packed of) const { return (packed & of) != 0; }

    OPTIM8_DEVICE Block(const StepRow<Rule>& row, int64_t block) {
        const int64_t at = block * step_block;
        param = static_cast<P*>(row.param) + at;
        grad = static_cast<const G*>(row.grad) + at;
        for (int s = 0; s < state_count<Rule>; ++s) {
            codes[s] = static_cast<uint8_t*>(row.state[s]) + at;
            low[s] = row.low[s] + at;
            absmax[s] = row.absmax[s] + block;
        }
        param_low = row.param_low;
        begin = at;
        first_in_block = row.first_in_block;
        weight = sizeof(P) == 2 ? row.weight : Weight::Plain;
        count = values_in_tile(row.size, at);
        number = row.first_block + static_cast<uint32_t>(block);
        packed = count == step_block ? row.packed : 0;
    }
};

// A whole block at addresses fit for packets. False, with nothing changed, where a value is not finite or leaves the
// range of Quick. The same in every lane. `wide`: its weights are, or dithered.
template <bool wide, class Coding, class Rule, class P, class G>
OPTIM8_DEVICE bool step_quickly(const Block<Rule, P, G>& block, const StepScalars<Rule>& scalars,
                                const LaneStates<Rule, Coding>& lane_states) {
    constexpr int span = packet_span<P>;
    LaneWords<P> param;
    LaneWords<G> grad;
    uint32_t codes[state_count<Rule>][per_lane / 4], pairs[state_count<Rule>][per_lane / 2];
    float absmax[state_count<Rule>];
    LaneWeights<P, wide> weights;
    load_words<span>(block.param + place<span>(0), param.word);
    weights.load_low(block.weight, block.param_low, block.begin);
    load_words<span>(block.grad + place<span>(0), grad.word);
    each_state<Rule>([&](auto s) {
        load_bytes<span>(block.codes[s.index], codes[s.index]);
        if constexpr (Coding::template low<Rule, s.index>) {
            uint32_t low[per_lane / 4];
            load_bytes<span>(block.low[s.index], low);
            join_pairs(codes[s.index], low, pairs[s.index]);
        }
        absmax[s.index] = *block.absmax[s.index];
    });
    __syncwarp();  // so that no load waits for the tables: their look-ups stay behind it

    float now[state_count<Rule>][per_lane], weight[per_lane];
    uint32_t largest[state_count<Rule>] = {};
#pragma unroll
    for (int k = 0; k < per_lane; ++k) weight[k] = param[k];
    weights.join(block.weight, weight);
    bool in_range = true;
#pragma unroll
    for (int k = 0; k < per_lane; ++k) {
        Quick p(weight[k]), state[state_count<Rule>];
        each_state<Rule>([&](auto s) {
            constexpr Code code = code_of<Rule, s.index>;
            float quotient;
            if constexpr (Coding::template low<Rule, s.index>)
                quotient = decode16_lane<code>(
                    __byte_perm(pairs[s.index][k / 2], mantissa_unit_bits, k % 2 == 0 ? 0x7610 : 0x7632));
            else
                quotient = decode<code>(byte_of(codes[s.index], k));
            const float value = quotient * absmax[s.index];
            state[s.index] = Quick(restore<Coding::template root<Rule, s.index>>(value));
        });
        Rule::update(p, Quick(grad[k] * scalars.gradient_factor), state, scalars.of_rule);
        each_state<Rule>([&](auto s) { state[s.index] = keep<Coding::template root<Rule, s.index>>(state[s.index]); });
        weight[k] = p.x;
        in_range = in_range && p.in_range;
        for (int s = 0; s < state_count<Rule>; ++s) {
            in_range = in_range && state[s].in_range;
            now[s][k] = state[s].x;
            largest[s] = larger_magnitude(largest[s], now[s][k]);
        }
    }
    in_range = in_range && weights.are_numbers(weight);
    largest[0] = in_range ? largest[0] : inf_bits;
    bool good = true;
    for (int s = 0; s < state_count<Rule>; ++s) {
        largest[s] = largest_of_warp(largest[s]);
        good = good && largest[s] < inf_bits;
    }
    if (!good) return false;

    const uint32_t start = lane_dither_start<span>(block.number, scalars.dither_time);
    weights.store(block.weight, weight, start, block.param, block.param_low, block.begin);
    each_state<Rule>([&](auto s) {
        constexpr bool root = Coding::template root<Rule, s.index>;
        constexpr Rounding scaling = Coding::template scaling<Rule, s.index>;
        const BlockScale by = block_scale<code_of<Rule, s.index>, scaling, root>(float_of(largest[s.index]));
        if (by.normal.scale != 1.0f)
            for (float& x : now[s.index]) x *= by.normal.scale;
        uint32_t words[per_lane / 4], rest[per_lane / 4];
        const auto& encoder = lane_states.template of<s.index>();
        encoder.template encode<span>(now[s.index], by.normal.reciprocal, start, words, rest);
        if constexpr (Coding::template low<Rule, s.index>) store_bytes<span>(block.low[s.index], rest);
        store_bytes<span>(block.codes[s.index], words);
        if (lane() == 0) *block.absmax[s.index] = by.absmax;
    });
    return true;
}

OPTIM8_END
