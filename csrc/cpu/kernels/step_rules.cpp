// One optimizer step over blocks of one tensor, for any rule: decode, update, block maximum, encode. Names no rule.
//
// A block is worked in passes over scratch that stays in L1: `advance` decodes the old state, updates, and finds the
// block's maxima; `seal` encodes the new state, one state after another, so that what its loop needs fits the
// registers. A block is sealed after the next one has advanced, which hides the latency of reducing the maxima; or
// where there is one state only, while it does, so that each loop's instructions fill the other's latencies.
//
// The code of a rule knows float32 parameters and gradients only; others are converted as they are loaded and stored.
#include "core/norms.h"
#include "core/row.h"
#include "cpu/kernels/block_parts.h"
#include "cpu/kernels/step_parts.h"
#include "cpu/kernels/vectors.h"

#include <algorithm>
#include <cstring>

OPTIM8_BEGIN
namespace {

// A block between its two passes.
template <class Rule>
struct Block {
    alignas(64) float state[state_count<Rule>][step_block];  // new, not yet quantized
    alignas(64) float old_param[Rule::states_need_param ? step_block : 1];
    uint8_t* codes[state_count<Rule>];
    uint8_t* low[state_count<Rule>];
    float* absmax[state_count<Rule>];
    float new_absmax[state_count<Rule>], reciprocal[state_count<Rule>];
    uint32_t dither;  // u of the first element
};

// Zero-padded copies of a short last block, so that the passes know whole blocks only. Padding takes part in
// nothing: its moments stay 0.
template <class Rule>
struct Tail {
    alignas(64) unsigned char param[4 * step_block], param_low[2 * step_block], grad[4 * step_block];
    uint8_t codes[state_count<Rule>][step_block], low[state_count<Rule>][step_block];
};

// What is kept now of one element of all states.
template <class Coding, int s, class Rule>
void keep_one(float (&state)[state_count<Rule>]) {
    if constexpr (s < state_count<Rule>) {
        state[s] = keep<Coding::template root<Rule, s>>(state[s]);
        keep_one<Coding, s + 1, Rule>(state);
    }
}

// The rare path of a block that holds values which are not finite. Such an element gets code 0, and its part in the
// block's maxima is what it would be had its gradient been 0; so the block's other elements do not notice it.
template <class Coding, class Rule>
__attribute__((noinline)) void mend(Block<Rule>& block, const StepScalars<Rule>& scalars,
                                    uint32_t (&largest)[state_count<Rule>]) {
    for (uint32_t& l : largest) l = 0;
    for (int i = 0; i < step_block; ++i) {
        float now[state_count<Rule>];
        bool finite = true;
        for (int s = 0; s < state_count<Rule>; ++s) {
            now[s] = block.state[s][i];
            finite = finite && is_finite(now[s]);
        }
        if (!finite) {
            float param = Rule::states_need_param ? block.old_param[i] : 0.0f;
            for (int s = 0; s < state_count<Rule>; ++s) block.state[s][i] = 0.0f;
            decode_one<Coding, 0, Rule>(block, i, now);
            Rule::update(param, 0.0f, now, scalars.of_rule);
            keep_one<Coding, 0, Rule>(now);
        }
        for (int s = 0; s < state_count<Rule>; ++s)
            if (is_finite(now[s])) largest[s] = maximum(largest[s], magnitude_bits(now[s]));
    }
}

// What one pass over a block reads and gathers in registers.
template <class Rule>
struct Pass {
    F absmax[state_count<Rule>];
    U largest[state_count<Rule>];

    OPTIM8_HD explicit Pass(const Block<Rule>& block) {
        for (int s = 0; s < state_count<Rule>; ++s) {
            absmax[s] = F(*block.absmax[s]);
            largest[s] = U(0u);
        }
    }
};

// What orders like the magnitude; where the code has no sign, nor have the values.
OPTIM8_HD U sized_bits(Code code, F x) { return is_signed(code) ? magnitude_bits(x) : bits_of(x); }

// Stores what is kept of a new state, and counts it.
template <class Coding, int s, class Rule>
OPTIM8_HD void keep_states(Block<Rule>& block, Pass<Rule>& pass, const Vectors (&now)[state_count<Rule>], int i) {
    if constexpr (s < state_count<Rule>) {
        const Vectors keeps = keep<Coding::template root<Rule, s>>(now[s]);
        for (int k = 0; k < together; ++k) {
            store(block.state[s] + i + k * width, keeps.v[k]);
            pass.largest[s] = maximum(pass.largest[s], sized_bits(Rule::states[s].code, keeps.v[k]));
        }
        keep_states<Coding, s + 1>(block, pass, now, i);
    }
}

template <class Coding, class Rule>
OPTIM8_HD void advance(Block<Rule>& block, Pass<Rule>& pass, Group& param, const Group& grad,
                       const StepScalars<Rule>& scalars, int at) {
    F state[state_count<Rule>][group_vectors];
    decode_states<Coding, 0, Rule>(block, pass.absmax, at, state);
    for (int j = 0; j < group_vectors; j += together) {
        const int i = at + j * width;
        Vectors p = Vectors::of([&](int k) { return param.vector[j + k]; });
        if constexpr (Rule::states_need_param)
            for (int k = 0; k < together; ++k) store(block.old_param + i + k * width, p.v[k]);
        const Vectors g = Vectors::of([&](int k) { return grad.vector[j + k]; });
        Vectors now[state_count<Rule>];
        for (int s = 0; s < state_count<Rule>; ++s) now[s] = Vectors::of([&](int k) { return state[s][j + k]; });
        Rule::update(p, g * Vectors(scalars.gradient_factor), now, scalars.of_rule);
        for (int k = 0; k < together; ++k) param.vector[j + k] = p.v[k];
        keep_states<Coding, 0>(block, pass, now, i);
    }
}

template <class Coding, int s, class Rule>
OPTIM8_HD void scale_states(Block<Rule>& block, const uint32_t (&largest)[state_count<Rule>]) {
    if constexpr (s < state_count<Rule>) {
        constexpr bool root = Coding::template root<Rule, s>;
        const BlockScale by =
            block_scale<code_of<Rule, s>, Coding::template scaling<Rule, s>, root>(float_of(largest[s]));
        block.new_absmax[s] = by.absmax;
        block.reciprocal[s] = by.normal.reciprocal;
        if (__builtin_expect(by.normal.scale != 1.0f, 0))
            for (float& x : block.state[s]) x *= by.normal.scale;
        scale_states<Coding, s + 1>(block, largest);
    }
}

// After the last group has advanced.
template <class Coding, class Rule>
OPTIM8_HD void normalize(Block<Rule>& block, const Pass<Rule>& pass, const StepScalars<Rule>& scalars) {
    uint32_t bits[state_count<Rule>];
    bool finite = true;
    for (int s = 0; s < state_count<Rule>; ++s) {
        bits[s] = reduce_max(pass.largest[s]);
        finite = finite && bits[s] < inf_bits;
    }
    if (__builtin_expect(!finite, 0)) mend<Coding>(block, scalars, bits);
    scale_states<Coding, 0>(block, bits);
}

template <class Coding, int s, class Rule>
OPTIM8_HD void seal_group(const Block<Rule>& block, int at) {
    constexpr Code code = code_of<Rule, s>;
    F x[group_vectors];
    load_vectors(block.state[s] + at, x);
    uint8_t* codes = block.codes[s] + at;
    if constexpr (Coding::template low<Rule, s>)
        encode16_group<code, s, Coding::rounding>(x, block.reciprocal[s], block.dither, at, codes, block.low[s] + at);
    else if constexpr (Coding::rounding == Rounding::Dithered)
        encode_group_dithered<code, s>(x, block.reciprocal[s], block.dither, at, codes);
    else
        encode_group<code>(x, block.reciprocal[s], codes);
}
template <class Coding, int s = 0, class Rule>
OPTIM8_HD void seal(const Block<Rule>& block) {
    if constexpr (s < state_count<Rule>) {
        for (int at = 0; at < step_block; at += code_group) seal_group<Coding, s>(block, at);
        *block.absmax[s] = block.new_absmax[s];
        seal<Coding, s + 1>(block);
    }
}
template <class Rule>
constexpr bool seals_meanwhile = state_count<Rule> == 1;

// Advances a block, and seals the one before it where there is one.
template <class Coding, class Rule>
OPTIM8_HD void work(Block<Rule>& block, const Weights& param, const Values& grad, const StepScalars<Rule>& scalars,
                    int blocks_ahead, const Block<Rule>* before) {
    Pass<Rule> pass(block);
    for (int at = 0; at < step_block; at += code_group) {
        prefetch_group(param.at(at), bytes_of(param.storage), blocks_ahead);
        prefetch_group(grad.at(at), bytes_of(grad.storage), blocks_ahead);
        for (int s = 0; s < state_count<Rule>; ++s) prefetch_group(block.codes[s] + at, 1, blocks_ahead);
        Group of_param, of_grad;
        of_param.load(param, at);
        of_grad.load(grad, at);
        advance<Coding>(block, pass, of_param, of_grad, scalars, at);
        of_param.store(param, at);
        if (seals_meanwhile<Rule> && before != nullptr) seal_group<Coding, 0>(*before, at);
    }
    if (before != nullptr) {
        if constexpr (seals_meanwhile<Rule>)
            *before->absmax[0] = before->new_absmax[0];
        else
            seal<Coding>(*before);
    }
    normalize<Coding>(block, pass, scalars);
}

template <class Rule, class Coding>
void step_codes(const Row& row, int64_t begin, int64_t end) {
    const StepScalars<Rule> scalars = trusted<Rule>(scalars_of<Rule>(*row.scalars), row.sums);
    const Weights param = param_of(row, scalars.dither_time);
    const Values grad = grad_of(row);
    const int64_t whole = std::min(end, row.size / step_block);
    const int ahead = blocks_ahead_of(row);
    Block<Rule> blocks[2];

    const auto point = [&](Block<Rule>& block, int64_t b) {
        for (int s = 0; s < state_count<Rule>; ++s) {
            block.codes[s] = static_cast<uint8_t*>(row.state[s]) + b * step_block;
            block.low[s] = row.low[s] == nullptr ? nullptr : row.low[s] + b * step_block;
            block.absmax[s] = row.absmax[s] + b;
        }
        if (Coding::rounding == Rounding::Dithered)
            block.dither = dither_start(row.first_block + static_cast<uint32_t>(b), scalars.dither_time);
    };
    const auto params = [&](int64_t b) { return param.from(b * step_block); };
    const auto grads = [&](int64_t b) { return grad.from(b * step_block); };
    if (begin < whole) {
        point(blocks[begin & 1], begin);
        work<Coding, Rule>(blocks[begin & 1], params(begin), grads(begin), scalars, ahead, nullptr);
        for (int64_t b = begin + 1; b < whole; ++b) {
            point(blocks[b & 1], b);
            work<Coding>(blocks[b & 1], params(b), grads(b), scalars, ahead, &blocks[(b - 1) & 1]);
        }
        seal<Coding>(blocks[(whole - 1) & 1]);
    }

    if (end > whole) {
        const int64_t at = whole * step_block;
        const size_t n = static_cast<size_t>(row.size - at);
        const Weights rest = param.from(at);
        const size_t param_bytes = n * static_cast<size_t>(bytes_of(param.storage));
        const size_t low_bytes = rest.low == nullptr ? 0 : n * static_cast<size_t>(bytes_of(row.weight));
        Tail<Rule> tail{};
        std::memcpy(tail.param, rest.data, param_bytes);
        if (low_bytes > 0) std::memcpy(tail.param_low, rest.low, low_bytes);
        std::memcpy(tail.grad, grad.at(at), n * static_cast<size_t>(bytes_of(grad.storage)));
        Block<Rule>& block = blocks[0];
        point(block, whole);
        for (int s = 0; s < state_count<Rule>; ++s) {
            // The code of 0, so that padding decodes to 0.
            std::memset(tail.codes[s], zero_code_of(Rule::states[s].code), step_block);
            std::memcpy(tail.codes[s], block.codes[s], n);
            block.codes[s] = tail.codes[s];
            if (block.low[s] != nullptr) {
                std::memset(tail.low[s], middle_low, step_block);
                std::memcpy(tail.low[s], block.low[s], n);
                block.low[s] = tail.low[s];
            }
        }
        const Weights padded = rest.in(tail.param, tail.param_low);
        work<Coding, Rule>(block, padded, {tail.grad, grad.storage}, scalars, ahead, nullptr);
        seal<Coding>(block);
        std::memcpy(rest.data, tail.param, param_bytes);
        if (low_bytes > 0) std::memcpy(rest.low, tail.param_low, low_bytes);
        for (int s = 0; s < state_count<Rule>; ++s) {
            std::memcpy(static_cast<uint8_t*>(row.state[s]) + at, tail.codes[s], n);
            if (row.low[s] != nullptr) std::memcpy(row.low[s] + at, tail.low[s], n);
        }
    }
}

template <class Rule>
void step_32bit(const Row& row, int64_t begin, int64_t end) {
    const StepScalars<Rule> scalars = trusted<Rule>(scalars_of<Rule>(*row.scalars), row.sums);
    const F factor(scalars.gradient_factor);
    const Weights param = param_of(row, scalars.dither_time);
    const Values grad = grad_of(row);
    float* state[state_count<Rule>]{};
    for (int s = 0; s < kept_count<Rule>; ++s) state[s] = static_cast<float*>(row.state[s]);

    alignas(64) float p_scratch[code_group], g_scratch[code_group];

    // A group of values, and of each state.
    const auto advance_group = [&](float* p, const float* g, float* const(&states)[state_count<Rule>]) {
        for (int i = 0; i < code_group; i += width) {
            F now_p = load(p + i), now[state_count<Rule>];
            for (int s = 0; s < state_count<Rule>; ++s) now[s] = Rule::stateless ? F(0.0f) : load(states[s] + i);
            Rule::update(now_p, load(g + i) * factor, now, scalars.of_rule);
            store(p + i, now_p);
            for (int s = 0; s < kept_count<Rule>; ++s) store(states[s] + i, now[s]);
        }
    };
    const int64_t last = std::min(end * step_block, row.size);
    int64_t i = begin * step_block;
    for (; i + code_group <= last; i += code_group) {
        float* at[state_count<Rule>]{};
        for (int s = 0; s < kept_count<Rule>; ++s) at[s] = state[s] + i;
        advance_group(widen(param, i, p_scratch), widen(grad, i, g_scratch), at);
        narrow(p_scratch, param, i);
    }
    if (i < last) {
        const size_t n = static_cast<size_t>(last - i), param_bytes = n * static_cast<size_t>(bytes_of(param.storage));
        const Weights left = param.from(i);
        const size_t low_bytes = left.low == nullptr ? 0 : n * static_cast<size_t>(bytes_of(row.weight));
        alignas(64) unsigned char p[4 * code_group] = {}, low[2 * code_group] = {}, g[4 * code_group] = {};
        alignas(64) float rest[state_count<Rule>][code_group] = {};
        float* at[state_count<Rule>]{};
        std::memcpy(p, left.data, param_bytes);
        if (low_bytes > 0) std::memcpy(low, left.low, low_bytes);
        std::memcpy(g, grad.at(i), n * static_cast<size_t>(bytes_of(grad.storage)));
        for (int s = 0; s < kept_count<Rule>; ++s) {
            std::memcpy(rest[s], state[s] + i, n * sizeof(float));
            at[s] = rest[s];
        }
        const Weights padded = left.in(p, low);
        advance_group(widen(padded, 0, p_scratch), widen(Values{g, grad.storage}, 0, g_scratch), at);
        narrow(p_scratch, padded, 0);
        std::memcpy(left.data, p, param_bytes);
        if (low_bytes > 0) std::memcpy(left.low, low, low_bytes);
        for (int s = 0; s < kept_count<Rule>; ++s) std::memcpy(state[s] + i, rest[s], n * sizeof(float));
    }
}

template <class Rule>
void step_rule(const Row& row, int64_t begin, int64_t end) {
    if (Rule::stateless || row.precision == Precision::Bits32) return step_32bit<Rule>(row, begin, end);
    if constexpr (!Rule::stateless)
        with_coding<Rule>(row, [&](auto coding) { step_codes<Rule, decltype(coding)>(row, begin, end); });
}

}  // namespace

template <>
void step_part<OPTIM8_PART>(const Row& row, int64_t begin, int64_t end) {
    with_rule<OPTIM8_PART>(row.rule, [&](auto rule) { step_rule<typename decltype(rule)::type>(row, begin, end); });
}

OPTIM8_END
