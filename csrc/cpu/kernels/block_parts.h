// What the passes over a block of a step read: parameters and gradients of any storage as float32, and the states as
// they were, by groups of values.
#pragma once

#include "core/dither.h"
#include "core/row.h"
#include "cpu/kernels/vectors.h"

OPTIM8_BEGIN

// The values of a parameter or gradient, of any storage.
struct Values {
    unsigned char* data;
    Storage storage;

    unsigned char* at(int64_t i) const { return data + i * bytes_of(storage); }
    Values from(int64_t i) const { return {at(i), storage}; }
};
inline Values param_of(const Row& row) { return {static_cast<unsigned char*>(row.param), row.param_storage}; }
inline Values grad_of(const Row& row) {
    return {static_cast<unsigned char*>(const_cast<void*>(row.grad)), row.grad_storage};  // which nobody writes to
}

// A group of values as float32: where it lies, or converted.
struct Group {
    alignas(64) float scratch[code_group];

    OPTIM8_HD float* widen(const Values& values, int64_t i) {
        if (values.storage == Storage::Float32) return reinterpret_cast<float*>(values.at(i));
        if (values.storage == Storage::BFloat16)
            convert(reinterpret_cast<const bfloat16*>(values.at(i)), scratch);
        else
            convert(reinterpret_cast<const float16*>(values.at(i)), scratch);
        return scratch;
    }
    // Back from where `widen` has put it.
    OPTIM8_HD void narrow(const Values& values, int64_t i) const {
        if (values.storage == Storage::BFloat16)
            convert(scratch, reinterpret_cast<bfloat16*>(values.at(i)));
        else if (values.storage == Storage::Float16)
            convert(scratch, reinterpret_cast<float16*>(values.at(i)));
    }

  private:
    template <class From, class To>
    OPTIM8_HD static void convert(const From* from, To* to) {
        for (int i = 0; i < code_group; i += width) store(to + i, load(from + i));
    }
};

// The states of a group. A Block has `codes`, `low` and `absmax` of each.
template <class Coding, int s, class Rule, class Block>
OPTIM8_HD void decode_states(const Block& block, const F (&absmax)[state_count<Rule>], int at,
                             F (&state)[state_count<Rule>][group_vectors]) {
    if constexpr (s < state_count<Rule>) {
        if constexpr (Coding::template low<Rule, s>)
            decode16_group<code_of<Rule, s>>(block.codes[s] + at, block.low[s] + at, state[s]);
        else
            decode_group<code_of<Rule, s>>(block.codes[s] + at, state[s]);
        constexpr bool root = Coding::template root<Rule, s>;
        for (int j = 0; j < group_vectors; ++j) state[s][j] = restore<root>(state[s][j] * absmax[s]);
        decode_states<Coding, s + 1, Rule>(block, absmax, at, state);
    }
}

// One element of all states.
template <class Coding, int s, class Rule, class Block>
void decode_one(const Block& block, int i, float (&state)[state_count<Rule>]) {
    if constexpr (s < state_count<Rule>) {
        constexpr Code code = code_of<Rule, s>;
        float quotient;
        if constexpr (Coding::template low<Rule, s>)
            quotient = decode16<code>(number16(block.codes[s][i], block.low[s][i]), Decode16TablesOf<code>::all);
        else
            quotient = Tables<code>::all.value[block.codes[s][i]];
        state[s] = restore<Coding::template root<Rule, s>>(quotient * *block.absmax[s]);
        decode_one<Coding, s + 1, Rule>(block, i, state);
    }
}

// What a group of a later block reads. Some processors' own prefetchers take the streams of a step for something else,
// depending on where code and arrays lie, and it then waits for every line. With narrower vectors its own instructions
// are what it waits for, and these would be more of them. Memory behind the end is not touched.
constexpr bool prefetches = width >= 16;
OPTIM8_HD void prefetch_group(const unsigned char* at, int64_t bytes_of_value) {
    constexpr int blocks_ahead = 4, line = 64;
    at += blocks_ahead * step_block * bytes_of_value;
    for (int64_t b = 0; prefetches && b < code_group * bytes_of_value; b += line) __builtin_prefetch(at + b);
}

OPTIM8_END
