// What the passes over a block of a step read: parameters and gradients of any storage as float32, and the states as
// they were, by groups of values.
#pragma once

#include "core/dither.h"
#include "core/row.h"
#include "cpu/kernels/vectors.h"

#include <algorithm>
#include <cstring>

OPTIM8_BEGIN

// The values of a parameter or gradient, of any storage.
struct Values {
    unsigned char* data;
    Storage storage;

    unsigned char* at(int64_t i) const { return data + i * bytes_of(storage); }
    Values from(int64_t i) const { return {at(i), storage}; }
};
// Those of a parameter, and the low bits beside them.
struct Weights : Values {
    unsigned char* low;  // or null
    Weight weight;
    uint32_t dither_time;
    int64_t first;  // index in the whole parameter

    Weights from(int64_t i) const {
        return {Values::from(i), low == nullptr ? nullptr : low + i * bytes_of(weight), weight, dither_time, first + i};
    }
    // The same in other memory.
    Weights in(unsigned char* data_there, unsigned char* low_there) const {
        return {{data_there, storage}, low == nullptr ? nullptr : low_there, weight, dither_time, first};
    }
};
inline Weights param_of(const Row& row, uint32_t dither_time) {
    return {{static_cast<unsigned char*>(row.param), row.param_storage},
            static_cast<unsigned char*>(row.param_low),
            row.weight,
            dither_time,
            int64_t{row.first_block} * step_block + row.first_in_block};
}
inline Values grad_of(const Row& row) {
    return {static_cast<unsigned char*>(const_cast<void*>(row.grad)), row.grad_storage};  // which nobody writes to
}

// A group of values as float32.
class Group {
  public:
    F vector[group_vectors];

    OPTIM8_HD void load(const Values& values, int64_t i) {
        if (values.storage == Storage::Float32)
            load_vectors(reinterpret_cast<const float*>(values.at(i)), vector);
        else if (values.storage == Storage::BFloat16)
            load_vectors(reinterpret_cast<const bfloat16*>(values.at(i)), vector);
        else
            load_vectors(reinterpret_cast<const float16*>(values.at(i)), vector);
    }
    OPTIM8_HD void load(const Weights& weights, int64_t i) {
        if (weights.low == nullptr) return load(static_cast<const Values&>(weights), i);
#if defined(OPTIM8_WEIGHT_VECTORS)
        if (weights.storage == Storage::BFloat16) {
            const bfloat16* param = reinterpret_cast<const bfloat16*>(weights.at(i));
            const unsigned char* low = weights.low + i * bytes_of(weights.weight);
            if (weights.weight == Weight::Bits24 ? join_weights(param, low, vector)
                                                 : join_weights(param, reinterpret_cast<const int16_t*>(low), vector))
                return;
        }
#endif
        alignas(64) float joint[code_group];
        join(weights, i, joint);
        load_vectors(joint, vector);
    }
    OPTIM8_HD void store(const Weights& weights, int64_t i) const {
        if (weights.weight != Weight::Plain) {
#if defined(OPTIM8_WEIGHT_VECTORS)
            if (weights.storage == Storage::BFloat16 && part_quickly(weights, i)) return;
#endif
            alignas(64) float joint[code_group];
            store_vectors(joint, vector);
            part(weights, i, joint);
        } else if (weights.storage == Storage::Float32) {
            store_vectors(reinterpret_cast<float*>(weights.at(i)), vector);
        } else if (weights.storage == Storage::BFloat16) {
            store_vectors(reinterpret_cast<bfloat16*>(weights.at(i)), vector);
        } else {
            store_vectors(reinterpret_cast<float16*>(weights.at(i)), vector);
        }
    }

  private:
#if defined(OPTIM8_WEIGHT_VECTORS)
    // Of a group that is of one block and without a NaN, to bfloat16 parameters. False otherwise, with nothing stored.
    OPTIM8_HD bool part_quickly(const Weights& weights, int64_t i) const {
        bfloat16* param = reinterpret_cast<bfloat16*>(weights.at(i));
        unsigned char* low = weights.low + i * bytes_of(weights.weight);
        if (weights.weight == Weight::Bits32) return part_weights<Weight::Bits32>(vector, 0, 0, param, low);
        const int64_t index = weights.first + i;
        const int at = static_cast<int>(index % step_block);
        if (__builtin_expect(at + code_group > step_block, 0)) return false;
        const uint32_t start = dither_start(static_cast<uint32_t>(index / step_block), weights.dither_time);
        return weights.weight == Weight::Bits24 ? part_weights<Weight::Bits24>(vector, start, at, param, low)
                                                : part_weights<Weight::Dithered>(vector, start, at, param, low);
    }
#endif

    using Floats = float[code_group];
    static void join(const Weights& weights, int64_t i, Floats& joint);
    static void part(const Weights& weights, int64_t i, const Floats& joint);

    // The loops below are over copies of a constant length, which compilers turn into vectors without asking whether
    // what they write is what they read.
    template <class T>
    struct Copy {
        alignas(64) T value[code_group];
        OPTIM8_HD explicit Copy(const unsigned char* from) { std::memcpy(value, from, sizeof value); }
        Copy() = default;
        OPTIM8_HD void to(unsigned char* there) const { std::memcpy(there, value, sizeof value); }
    };

    template <class P, class Low>
    OPTIM8_HD static void join_from(const unsigned char* param, const unsigned char* low, Floats& joint) {
        const Copy<uint16_t> p(param);
        const Copy<Low> l(low);
        for (int k = 0; k < code_group; ++k) joint[k] = weight_value<P>(join_weight(p.value[k], low_of(l.value[k])));
    }
    // The dither of the group's elements; shards may begin anywhere in a block, and so a group may be of two.
    OPTIM8_HD static void dithers_of(const Weights& weights, int64_t i, uint32_t (&u)[code_group]) {
        const auto& all = ElementDitherOf<dither_of_param>::all;
        const int64_t index = weights.first + i;
        const uint32_t block = static_cast<uint32_t>(index / step_block);
        const int at = static_cast<int>(index % step_block), of_block = std::min(step_block - at, code_group);
        const uint32_t start = dither_start(block, weights.dither_time);
        if (__builtin_expect(of_block == code_group, 1)) {
            for (int k = 0; k < code_group; ++k) u[k] = start + (all.of_element[at + k] << 16);
        } else {
            const uint32_t next = dither_start(block + 1, weights.dither_time);
            for (int k = 0; k < of_block; ++k) u[k] = start + (all.of_element[at + k] << 16);
            for (int k = of_block; k < code_group; ++k) u[k] = next + (all.of_element[k - of_block] << 16);
        }
    }
    template <class P, Weight kind>
    OPTIM8_HD static void part_into(const Weights& weights, int64_t i, const Floats& joint) {
        uint32_t weight[code_group], u[code_group] = {};
        if (kind != Weight::Bits32) dithers_of(weights, i, u);
        for (int k = 0; k < code_group; ++k) weight[k] = keep_weight(kind, weight_bits<P>(joint[k]), u[k]);
        Copy<uint16_t> p;
        for (int k = 0; k < code_group; ++k) p.value[k] = param_of_weight(weight[k]);
        p.to(weights.at(i));
        unsigned char* low = weights.low + i * bytes_of(kind);
        if (kind == Weight::Bits24) {
            Copy<uint8_t> bytes;
            for (int k = 0; k < code_group; ++k) bytes.value[k] = low_of_weight24(weight[k]);
            bytes.to(low);
        } else if (kind == Weight::Bits32) {
            Copy<int16_t> halves;
            for (int k = 0; k < code_group; ++k) halves.value[k] = low_of_weight(weight[k]);
            halves.to(low);
        }
    }
    template <class P>
    OPTIM8_HD static void part_as(const Weights& weights, int64_t i, const Floats& joint) {
        if (weights.weight == Weight::Dithered)
            part_into<P, Weight::Dithered>(weights, i, joint);
        else if (weights.weight == Weight::Bits24)
            part_into<P, Weight::Bits24>(weights, i, joint);
        else
            part_into<P, Weight::Bits32>(weights, i, joint);
    }
};

// The values of a group where they are float32, or as float32 in `scratch`: for loops that work one vector after
// another.
template <class From>
OPTIM8_HD float* widen(const From& values, int64_t i, float (&scratch)[code_group]) {
    if (values.storage == Storage::Float32) return reinterpret_cast<float*>(values.at(i));
    Group group;
    group.load(values, i);
    store_vectors(scratch, group.vector);
    return scratch;
}
// Back from where `widen` has put them.
OPTIM8_HD void narrow(const float (&scratch)[code_group], const Weights& weights, int64_t i) {
    if (weights.storage == Storage::Float32) return;
    Group group;
    load_vectors(scratch, group.vector);
    group.store(weights, i);
}

// Not inlined, or every rule's step would have them once for each kind of weight.
__attribute__((noinline)) inline void Group::join(const Weights& weights, int64_t i, Floats& joint) {
    const unsigned char *param = weights.at(i), *low = weights.low + i * bytes_of(weights.weight);
    const bool bytes = weights.weight == Weight::Bits24;
    if (weights.storage == Storage::BFloat16)
        bytes ? join_from<bfloat16, uint8_t>(param, low, joint) : join_from<bfloat16, int16_t>(param, low, joint);
    else
        bytes ? join_from<float16, uint8_t>(param, low, joint) : join_from<float16, int16_t>(param, low, joint);
}
__attribute__((noinline)) inline void Group::part(const Weights& weights, int64_t i, const Floats& joint) {
    if (weights.storage == Storage::BFloat16)
        part_as<bfloat16>(weights, i, joint);
    else
        part_as<float16>(weights, i, joint);
}

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
// `blocks_ahead`: little, so that it is not evicted before it is read; but of small tensors the whole next one.
constexpr bool prefetches = width >= 16;
inline int blocks_ahead_of(const Row& row) { return row.size < 16 * step_block ? 4 : 2; }
OPTIM8_HD void prefetch_group(const unsigned char* at, int64_t bytes_of_value, int blocks_ahead = 4) {
    constexpr int line = 64;
    at += blocks_ahead * step_block * bytes_of_value;
    for (int64_t b = 0; prefetches && b < code_group * bytes_of_value; b += line) __builtin_prefetch(at + b);
}

OPTIM8_END
