// The ways that rare blocks of a step take: short or unaligned ones, numbers that are not finite, 32-bit state.
#pragma once

#include "cuda/step_block.h"

OPTIM8_BEGIN

// The quotient of a code, with its low byte in 16 bits.
template <bool low_bytes, Code code>
OPTIM8_DEVICE float decode_either(uint8_t of, uint8_t low) {
    if constexpr (low_bytes)
        return decode16_lane<code>(mantissa_unit_bits | number16(of, low));
    else
        return decode<code>(of);
}

// An element of a parameter as float32, and the lane's.
template <class Rule, class P, class G>
OPTIM8_DEVICE float load_weight(const Block<Rule, P, G>& block, int i) {
    if constexpr (sizeof(P) == 2) {
        if (block.weight == Weight::Bits24 || block.weight == Weight::Bits32) {
            const int64_t at = block.begin + i;
            const int32_t low = block.weight == Weight::Bits24
                                    ? low_of(static_cast<const uint8_t*>(block.param_low)[at])
                                    : low_of(static_cast<const int16_t*>(block.param_low)[at]);
            return weight_value<P>(join_weight(block.param[i].bits, low));
        }
    }
    return to_float(block.param[i]);
}
// The lane's k-th value, where k is no constant: an array with an address would be in memory.
OPTIM8_DEVICE float value_at(const float (&values)[per_lane], int k) {
    float x = values[0];
#pragma unroll
    for (int j = 1; j < per_lane; ++j) x = k == j ? values[j] : x;
    return x;
}
// The parameters of the lane. Weights that are wider come one at a time, in few instructions: they are not most.
template <int span, class Rule, class P, class G>
OPTIM8_DEVICE void load_weights(const Block<Rule, P, G>& block, float (&param)[per_lane]) {
    P narrow[per_lane];
    load_tile<span>(block.param, block.count, block.well(packed_param), P{}, narrow);
#pragma unroll
    for (int k = 0; k < per_lane; ++k) param[k] = to_float(narrow[k]);
    if constexpr (sizeof(P) == 2) {
        if (block.weight != Weight::Bits24 && block.weight != Weight::Bits32) return;
#pragma unroll 1
        for (int k = 0; k < per_lane; ++k) {
            const int i = place<span>(k);
            const float x = i < block.count ? load_weight(block, i) : 0.0f;
#pragma unroll
            for (int j = 0; j < per_lane; ++j) param[j] = k == j ? x : param[j];
        }
    }
}
// Stores them; `time`: of the dither.
template <int span, class Rule, class P, class G>
OPTIM8_DEVICE void store_weights(const Block<Rule, P, G>& block, uint32_t time, const float (&param)[per_lane]) {
    if constexpr (sizeof(P) == 2) {
        if (block.weight != Weight::Plain) {
#pragma unroll 1
            for (int k = 0; k < per_lane; ++k) {
                const int i = place<span>(k);
                if (i >= block.count) continue;
                const uint32_t at = block.first_in_block + static_cast<uint32_t>(i);
                const uint32_t u =
                    dither<dither_of_param>(dither_start(block.number + at / step_block, time), at % step_block);
                const uint32_t weight = keep_weight(block.weight, weight_bits<P>(value_at(param, k)), u);
                block.param[i].bits = param_of_weight(weight);
                if (block.weight == Weight::Bits24)
                    static_cast<uint8_t*>(block.param_low)[block.begin + i] = low_of_weight24(weight);
                if (block.weight == Weight::Bits32)
                    static_cast<int16_t*>(block.param_low)[block.begin + i] = low_of_weight(weight);
            }
            return;
        }
    }
    P narrow[per_lane];
#pragma unroll
    for (int k = 0; k < per_lane; ++k) narrow[k] = from_float<P>(param[k]);
    store_tile<span>(block.param, block.count, block.well(packed_param), narrow);
}

// What the lane's elements in `bad` would add to the block's maxima, had their gradients been 0. One element at a time
// and from memory, where param and codes are still the old ones: this path is rare, and must cost no registers.
template <class Coding, int span, class Rule, class P, class G>
OPTIM8_DEVICE void count_as_without_gradient(const Block<Rule, P, G>& block, const StepScalars<Rule>& scalars,
                                             uint32_t bad, uint32_t (&largest)[state_count<Rule>]) {
#pragma unroll 1
    for (int k = 0; k < per_lane; ++k) {
        if ((bad >> k & 1) == 0) continue;
        const int i = place<span>(k);
        const bool there = i < block.count;
        float param = there ? load_weight(block, i) : 0.0f, now[state_count<Rule>];
        each_state<Rule>([&](auto s) {
            const uint8_t code = there ? block.codes[s.index][i] : zero_code_of(code_of<Rule, s.index>);
            constexpr bool low_bytes = Coding::template low<Rule, s.index>;
            uint8_t low = middle_low;
            if constexpr (low_bytes) low = there ? block.low[s.index][i] : middle_low;
            now[s.index] = restore<Coding::template root<Rule, s.index>>(
                decode_either<low_bytes, code_of<Rule, s.index>>(code, low) * *block.absmax[s.index]);
        });
        Rule::update(param, 0.0f, now, scalars.of_rule);
        each_state<Rule>([&](auto s) { now[s.index] = keep<Coding::template root<Rule, s.index>>(now[s.index]); });
        for (int s = 0; s < state_count<Rule>; ++s)
            if (is_finite(now[s])) largest[s] = maximum(largest[s], magnitude_bits(now[s]));
    }
}

// Any block.
template <class Coding, class Rule, class P, class G>
OPTIM8_DEVICE void step_carefully(const Block<Rule, P, G>& block, const StepScalars<Rule>& scalars) {
    constexpr int span = packet_span<P>;
    float param[per_lane], now[per_lane][state_count<Rule>];
    G grad[per_lane];
    uint8_t codes[state_count<Rule>][per_lane], low[state_count<Rule>][per_lane] = {};
    float absmax[state_count<Rule>];
    load_weights<span>(block, param);
    load_tile<span>(block.grad, block.count, block.well(packed_grad), G{}, grad);
    each_state<Rule>([&](auto s) {
        // Values that are not there decode to 0, so they take part in nothing.
        load_tile<span>(block.codes[s.index], block.count, block.well(packed_states),
                        zero_code_of(code_of<Rule, s.index>), codes[s.index]);
        if constexpr (Coding::template low<Rule, s.index>)
            load_tile<span>(block.low[s.index], block.count, block.well(packed_states), middle_low, low[s.index]);
        absmax[s.index] = *block.absmax[s.index];
    });

    uint32_t largest[state_count<Rule>] = {};
#pragma unroll
    for (int k = 0; k < per_lane; ++k) {
        each_state<Rule>([&](auto s) {
            constexpr bool low_bytes = Coding::template low<Rule, s.index>;
            const float value =
                decode_either<low_bytes, code_of<Rule, s.index>>(codes[s.index][k], low[s.index][k]) * absmax[s.index];
            now[k][s.index] = restore<Coding::template root<Rule, s.index>>(value);
        });
        Rule::update(param[k], to_float(grad[k]) * scalars.gradient_factor, now[k], scalars.of_rule);
        each_state<Rule>(
            [&](auto s) { now[k][s.index] = keep<Coding::template root<Rule, s.index>>(now[k][s.index]); });
        for (int s = 0; s < state_count<Rule>; ++s) largest[s] = maximum(largest[s], magnitude_bits(now[k][s]));
    }
    bool finite = true;
    for (int s = 0; s < state_count<Rule>; ++s) {
        largest[s] = largest_of_lanes(largest[s], warp_size);
        finite = finite && largest[s] < inf_bits;
    }
    if (!finite) {
        // An element that is not finite gets code 0, and does not show in the block's maxima.
        uint32_t bad = 0;
        for (int s = 0; s < state_count<Rule>; ++s) largest[s] = 0;
#pragma unroll
        for (int k = 0; k < per_lane; ++k) {
            bool good = true;
            for (int s = 0; s < state_count<Rule>; ++s) good = good && is_finite(now[k][s]);
            bad |= good ? 0u : 1u << k;
            for (int s = 0; s < state_count<Rule>; ++s) {
                now[k][s] = good ? now[k][s] : 0.0f;
                largest[s] = maximum(largest[s], magnitude_bits(now[k][s]));
            }
        }
        count_as_without_gradient<Coding, span>(block, scalars, bad, largest);
        for (int s = 0; s < state_count<Rule>; ++s) largest[s] = largest_of_lanes(largest[s], warp_size);
    }

    store_weights<span>(block, scalars.dither_time, param);
    const LaneStates<Rule, Coding> lane_states;
    const uint32_t start = lane_dither_start<span>(block.number, scalars.dither_time);
    each_state<Rule>([&](auto s) {
        constexpr bool root = Coding::template root<Rule, s.index>;
        constexpr bool low_bytes = Coding::template low<Rule, s.index>;
        constexpr Rounding scaling = Coding::template scaling<Rule, s.index>;
        const BlockScale by = block_scale<code_of<Rule, s.index>, scaling, root>(float_of(largest[s.index]));
        uint8_t encoded[per_lane], rest[per_lane];
#pragma unroll
        for (int k = 0; k < per_lane; ++k) {
            const uint32_t word = lane_states.template of<s.index>().encode(
                now[k][s.index] * by.normal.scale, by.normal.reciprocal, lane_dither<s.index, span>(start, k));
            encoded[k] = low_bytes ? code_of16(word) : static_cast<uint8_t>(word);
            rest[k] = low_of16(word);
        }
        if constexpr (low_bytes) store_tile<span>(block.low[s.index], block.count, block.well(packed_states), rest);
        store_tile<span>(block.codes[s.index], block.count, block.well(packed_states), encoded);
        if (lane() == 0) *block.absmax[s.index] = by.absmax;
    });
}

template <class Rule, class P, class G>
OPTIM8_DEVICE void step_32bit(const StepRow<Rule>& row, const Block<Rule, P, G>& block, int64_t at,
                              const StepScalars<Rule>& scalars) {
    constexpr int span = packet_span<P>;
    float param[per_lane];
    G grad[per_lane];
    float state[state_count<Rule>][per_lane] = {};
    load_weights<span>(block, param);
    load_tile<span>(block.grad, block.count, block.well(packed_grad), G{}, grad);
    for (int s = 0; s < kept_count<Rule>; ++s)
        load_tile<span>(static_cast<const float*>(row.state[s]) + at, block.count, block.well(packed_states), 0.0f,
                        state[s]);
#pragma unroll
    for (int k = 0; k < per_lane; ++k) {
        float now[state_count<Rule>];
        for (int s = 0; s < state_count<Rule>; ++s) now[s] = state[s][k];
        Rule::update(param[k], to_float(grad[k]) * scalars.gradient_factor, now, scalars.of_rule);
        for (int s = 0; s < state_count<Rule>; ++s) state[s][k] = now[s];
    }
    store_weights<span>(block, scalars.dither_time, param);
    for (int s = 0; s < kept_count<Rule>; ++s)
        store_tile<span>(static_cast<float*>(row.state[s]) + at, block.count, block.well(packed_states), state[s]);
}

OPTIM8_END
