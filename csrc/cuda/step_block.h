// A block of a step, 256 values of one tensor, and the way that nearly all of them take.
#pragma once

#include "cuda/quick.h"
#include "cuda/tables.h"

#include <utility>

OPTIM8_BEGIN

// A row as the kernels of one rule take it: the fewer states, the more rows a launch has.
template <class Rule>
struct StepRow {
    void* param;
    const void* grad;
    void* state[state_count<Rule>];
    float* absmax[state_count<Rule>];
    int64_t size;
    int32_t scalars;  // index
    Precision precision;
    bool packed_well;  // every address fits 16-byte packets
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

// The encoders of all states, loaded once for all blocks of a warp.
template <class Rule>
struct LaneCodes {
    LaneLines lines[state_count<Rule>];
    OPTIM8_DEVICE LaneCodes() {
        each_state<Rule>([&](auto s) { lines[s.index] = lane_code<code_of<Rule, s.index>>(); });
    }
    template <int s>
    OPTIM8_DEVICE LaneCode<code_of<Rule, s>> of() const {
        return LaneCode<code_of<Rule, s>>{lines[s]};
    }
};

// A block and where it lies.
template <class Rule, class P, class G>
struct Block {
    P* param;
    const G* grad;
    uint8_t* codes[state_count<Rule>];
    float* absmax[state_count<Rule>];
    int count;
    bool well;

    OPTIM8_DEVICE Block(const StepRow<Rule>& row, int64_t block) {
        const int64_t at = block * step_block;
        param = static_cast<P*>(row.param) + at;
        grad = static_cast<const G*>(row.grad) + at;
        for (int s = 0; s < state_count<Rule>; ++s) {
            codes[s] = static_cast<uint8_t*>(row.state[s]) + at;
            absmax[s] = row.absmax[s] + block;
        }
        count = values_in_tile(row.size, at);
        well = row.packed_well && count == step_block;
    }
};

// A whole block at addresses fit for packets. False, with nothing changed, where a value is not finite or leaves the
// range of Quick. The same in every lane.
template <class Rule, class P, class G>
OPTIM8_DEVICE bool step_quickly(const Block<Rule, P, G>& block, const StepScalars<Rule>& scalars,
                                const LaneCodes<Rule>& lane_codes) {
    constexpr int span = packet_span<P>;
    P param[per_lane];
    G grad[per_lane];
    uint32_t codes[state_count<Rule>][per_lane / 4];
    float absmax[state_count<Rule>];
    load_tile<span>(block.param, tile, true, P{}, param);
    load_tile<span>(block.grad, tile, true, G{}, grad);
    each_state<Rule>([&](auto s) {
        load_bytes<span>(block.codes[s.index], codes[s.index]);
        absmax[s.index] = *block.absmax[s.index];
    });

    float now[state_count<Rule>][per_lane];
    uint32_t largest[state_count<Rule>] = {};
    bool in_range = true;
#pragma unroll
    for (int k = 0; k < per_lane; ++k) {
        Quick p(to_float(param[k])), state[state_count<Rule>];
        each_state<Rule>([&](auto s) {
            state[s.index] = Quick(decode<code_of<Rule, s.index>>(byte_of(codes[s.index], k)) * absmax[s.index]);
        });
        Rule::update(p, Quick(to_float(grad[k]) * scalars.gradient_factor), state, scalars.of_rule);
        param[k] = from_float<P>(p.x);
        in_range = in_range && p.in_range;
        for (int s = 0; s < state_count<Rule>; ++s) {
            in_range = in_range && state[s].in_range;
            now[s][k] = state[s].x;
            largest[s] = larger_magnitude(largest[s], now[s][k]);
        }
    }
    largest[0] = in_range ? largest[0] : inf_bits;
    bool good = true;
    for (int s = 0; s < state_count<Rule>; ++s) {
        largest[s] = largest_of_warp(largest[s]);
        good = good && largest[s] < inf_bits;
    }
    if (!good) return false;

    store_tile<span>(block.param, tile, true, param);
    each_state<Rule>([&](auto s) {
        const auto code = lane_codes.template of<s.index>();
        const Normalizer normal = normalizer(float_of(largest[s.index]));
        if (normal.scale != 1.0f)
            for (float& x : now[s.index]) x *= normal.scale;
        uint32_t encoded[per_lane], words[per_lane / 4];
#pragma unroll
        for (int k = 0; k < per_lane; ++k) encoded[k] = encode_lane(now[s.index][k], normal.reciprocal, code);
        pack_bytes(encoded, words);
        store_bytes<span>(block.codes[s.index], words);
        if (lane() == 0) *block.absmax[s.index] = float_of(largest[s.index]);
    });
    return true;
}

OPTIM8_END
