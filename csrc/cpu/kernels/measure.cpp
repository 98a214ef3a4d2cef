// The squares of what the norms of a rule are taken of, added up over blocks (core/norms.h). Changes no tensor.
#include "core/norms.h"
#include "core/row.h"
#include "cpu/kernels/block_parts.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/vectors.h"

#include <algorithm>
#include <cstring>

OPTIM8_BEGIN
namespace {

// The states of a block in codes.
template <class Rule, class Coding>
struct CodedStates {
    const uint8_t* codes[state_count<Rule>];
    const uint8_t* low[state_count<Rule>];
    const float* absmax[state_count<Rule>];
    F scale[state_count<Rule>];

    CodedStates(const Row& row, int64_t block) {
        for (int s = 0; s < state_count<Rule>; ++s) {
            codes[s] = static_cast<const uint8_t*>(row.state[s]) + block * step_block;
            low[s] = row.low[s] == nullptr ? nullptr : row.low[s] + block * step_block;
            absmax[s] = row.absmax[s] + block;
            scale[s] = F(*absmax[s]);
        }
    }
    OPTIM8_HD void prefetch(int at) const {
        for (int s = 0; s < state_count<Rule>; ++s) prefetch_group(codes[s] + at, 1);
    }
    OPTIM8_HD void read(int at, F (&state)[state_count<Rule>][group_vectors]) const {
        decode_states<Coding, 0, Rule>(*this, scale, at, state);
    }
    void read_one(int i, float (&state)[state_count<Rule>]) const { decode_one<Coding, 0, Rule>(*this, i, state); }

    // Copies of a short block, with the codes of 0 behind its end.
    struct Tail {
        uint8_t codes[state_count<Rule>][step_block], low[state_count<Rule>][step_block];
    };
    void pad(Tail& tail, size_t n) {
        for (int s = 0; s < state_count<Rule>; ++s) {
            std::memset(tail.codes[s], zero_code_of(Rule::states[s].code), step_block);
            std::memcpy(tail.codes[s], codes[s], n);
            codes[s] = tail.codes[s];
            if (low[s] == nullptr) continue;
            std::memset(tail.low[s], middle_low, step_block);
            std::memcpy(tail.low[s], low[s], n);
            low[s] = tail.low[s];
        }
    }
};

// In float32, or not kept at all.
template <class Rule>
struct WideStates {
    const float* values[state_count<Rule>];

    WideStates(const Row& row, int64_t block) {
        for (int s = 0; s < kept_count<Rule>; ++s)
            values[s] = static_cast<const float*>(row.state[s]) + block * step_block;
    }
    OPTIM8_HD void prefetch(int) const {}
    OPTIM8_HD void read(int at, F (&state)[state_count<Rule>][group_vectors]) const {
        for (int s = 0; s < state_count<Rule>; ++s)
            for (int j = 0; j < group_vectors; ++j)
                state[s][j] = Rule::stateless ? F(0.0f) : load(values[s] + at + j * width);
    }
    void read_one(int i, float (&state)[state_count<Rule>]) const {
        for (int s = 0; s < state_count<Rule>; ++s) state[s] = Rule::stateless ? 0.0f : values[s][i];
    }

    struct Tail {
        float values[state_count<Rule>][step_block];
    };
    void pad(Tail& tail, size_t n) {
        for (int s = 0; s < kept_count<Rule>; ++s) {
            std::fill(tail.values[s], tail.values[s] + step_block, 0.0f);
            std::memcpy(tail.values[s], values[s], n * sizeof(float));
            values[s] = tail.values[s];
        }
    }
};

// A block whose squares do not add up in float32, or that holds what is not finite. The float32 sum that a block has
// without such elements is that of the way of all others.
template <class Rule, class States>
__attribute__((noinline)) void measure_carefully(const States& states, const Weights& param, const Values& grad,
                                                 const StepScalars<Rule>& scalars, double* sums) {
    float numbers[norms][step_block];
    for (int at = 0; at < step_block; at += code_group) {
        float p_scratch[code_group], g_scratch[code_group];
        const float *p = widen(param, at, p_scratch), *g = widen(grad, at, g_scratch);
        for (int i = 0; i < code_group; ++i) {
            float state[state_count<Rule>], of[norms];
            states.read_one(at + i, state);
            measure_finite<Rule>(p[i], g[i] * scalars.gradient_factor, state, scalars.of_rule, of);
            for (int n = 0; n < norms; ++n) numbers[n][at + i] = of[n];
        }
    }
    for (int n = 0; n < norms; ++n) {
        float squares[step_block];
        for (int i = 0; i < step_block; ++i) squares[i] = numbers[n][i] * numbers[n][i];
        const float sum = sum_by_halves(squares, step_block);
        sums[n] = static_cast<double>(sum);
        if (adds_up(sum)) continue;
        double exact[step_block];
        for (int i = 0; i < step_block; ++i) exact[i] = static_cast<double>(numbers[n][i]) * numbers[n][i];
        sums[n] = sum_by_halves(exact, step_block);
    }
}

template <class Rule, class States>
OPTIM8_HD void measure_block(const States& states, const Weights& param, const Values& grad,
                             const StepScalars<Rule>& scalars, double* sums) {
    constexpr int half = step_block / 2;
    static_assert(half % code_group == 0);
    alignas(64) float squares[norms][half];
    for (int first = 0; first < half; first += code_group) {
        // Of two groups half a block apart.
        F sums_of_two[norms][group_vectors];
        for (auto& of_norm : sums_of_two)
            for (F& sum : of_norm) sum = F(0.0f);
        for (int at = first; at < step_block; at += half) {
            prefetch_group(param.at(at), bytes_of(param.storage));
            prefetch_group(grad.at(at), bytes_of(grad.storage));
            states.prefetch(at);
            F state[state_count<Rule>][group_vectors];
            states.read(at, state);
            Group of_param, of_grad;
            of_param.load(param, at);
            of_grad.load(grad, at);
            for (int j = 0; j < group_vectors; j += together) {
                const Vectors p = Vectors::of([&](int k) { return of_param.vector[j + k]; });
                const Vectors g = Vectors::of([&](int k) { return of_grad.vector[j + k]; });
                Vectors old[state_count<Rule>], of[norms];
                for (int s = 0; s < state_count<Rule>; ++s)
                    old[s] = Vectors::of([&](int k) { return state[s][j + k]; });
                Rule::measure(p, g * Vectors(scalars.gradient_factor), old, scalars.of_rule, of);
                for (int n = 0; n < norms; ++n)
                    for (int k = 0; k < together; ++k) {
                        F& sum = sums_of_two[n][j + k];
                        sum = sum + of[n].v[k] * of[n].v[k];
                    }
            }
        }
        for (int n = 0; n < norms; ++n) store_vectors(squares[n] + first, sums_of_two[n]);
    }
    bool good = true;
    for (int n = 0; n < norms; ++n) {
        float* s = squares[n];
        int count = half / 2;
        for (; count >= width; count /= 2)
            for (int i = 0; i < count; i += width) store(s + i, load(s + i) + load(s + i + count));
        const float sum = sum_by_halves(s, 2 * count);
        sums[n] = static_cast<double>(sum);
        good = good && adds_up(sum);
    }
    if (__builtin_expect(!good, 0)) measure_carefully(states, param, grad, scalars, sums);
}

template <class Rule, class States>
void measure_row(const Row& row, int64_t begin, int64_t end) {
    const StepScalars<Rule> scalars = scalars_of<Rule>(*row.scalars);
    const Weights param = param_of(row, scalars.dither_time);
    const Values grad = grad_of(row);
    const int64_t whole = std::min(end, row.size / step_block);
    for (int64_t b = begin; b < whole; ++b)
        measure_block(States(row, b), param.from(b * step_block), grad.from(b * step_block), scalars,
                      row.of_blocks + norms * b);
    if (end > whole) {
        const int64_t at = whole * step_block;
        const size_t n = static_cast<size_t>(row.size - at);
        const Weights rest = param.from(at);
        alignas(64) unsigned char p[4 * step_block] = {}, low[2 * step_block] = {}, g[4 * step_block] = {};
        std::memcpy(p, rest.data, n * static_cast<size_t>(bytes_of(param.storage)));
        if (rest.low != nullptr) std::memcpy(low, rest.low, n * static_cast<size_t>(bytes_of(row.weight)));
        std::memcpy(g, grad.at(at), n * static_cast<size_t>(bytes_of(grad.storage)));
        States states(row, whole);
        typename States::Tail tail;
        states.pad(tail, n);
        const Weights padded = rest.in(p, low);
        measure_block(states, padded, Values{g, grad.storage}, scalars, row.of_blocks + norms * whole);
    }
}

template <class Rule>
void measure_rule(const Row& row, int64_t begin, int64_t end) {
    if constexpr (Rule::has_norms) {
        if (Rule::stateless || row.precision == Precision::Bits32)
            return measure_row<Rule, WideStates<Rule>>(row, begin, end);
        if constexpr (!Rule::stateless)
            with_coding<Rule>(
                row, [&](auto coding) { measure_row<Rule, CodedStates<Rule, decltype(coding)>>(row, begin, end); });
    }
}

}  // namespace

void measure_blocks(const Row& row, int64_t begin, int64_t end) {
    switch (row.rule) {
#define OPTIM8_MEASURE_CASE(name, type) \
    case RuleId::name: \
        return measure_rule<type>(row, begin, end);
        OPTIM8_RULES(OPTIM8_MEASURE_CASE)
#undef OPTIM8_MEASURE_CASE
    }
}

OPTIM8_END
