// One optimizer step over many tensors in one launch, for any rule, with 8- or 32-bit state. Names no rule.
//
// A block of 256 values belongs to one warp, eight values a lane: load, decode, update, block maximum by shuffles,
// encode, store. No shared memory, no barrier. The tensors' addresses travel in the kernel's parameters.
#pragma once

#include "cuda/step_any_block.h"
#include "cuda/step_batch.h"

OPTIM8_BEGIN

// Blocks of threads that a multiprocessor is to hold at least, which bounds the registers of a thread: by 128, or with
// three states by 168.
template <class Rule>
constexpr int blocks_at_least = state_count<Rule> == 3 ? 3 : 4;

// Whether whole blocks with such weights are stepped quickly. Beside two states in 16 bits they would not fit the
// registers.
template <class Rule, class Coding, class P>
OPTIM8_HD constexpr bool has_lane_weights() {
    if constexpr (state_count<Rule> == 2)
        if (Coding::template low<Rule, 0> && Coding::template low<Rule, 1>) return false;
    return LaneWeights<P, true>::completes;
}

// A block as nearly all are; false, with nothing changed, where it is none.
template <class Coding, class Rule, class P, class G>
OPTIM8_DEVICE bool step_usual(const StepRow<Rule>& row, const Block<Rule, P, G>& at, const StepScalars<Rule>& scalars,
                              const LaneStates<Rule, Coding>& lane_states) {
    if (row.precision == Precision::Bits32 || !at.well()) return false;
    if (at.weight == Weight::Plain) return step_quickly<false, Coding>(at, scalars, lane_states);
    // The dither goes by the blocks of the whole parameter.
    if constexpr (has_lane_weights<Rule, Coding, P>())
        if (at.first_in_block == 0) return step_quickly<true, Coding>(at, scalars, lane_states);
    return false;
}
// Any other.
template <class Coding, class Rule, class P, class G>
OPTIM8_DEVICE void step_unusual(const StepRow<Rule>& row, const Block<Rule, P, G>& at, int64_t block,
                                const StepScalars<Rule>& scalars) {
    if constexpr (!Rule::stateless)
        if (row.precision != Precision::Bits32) return step_carefully<Coding>(at, scalars);
    step_32bit(row, at, block * step_block, scalars);
}

template <class Rule, class Coding, class P, class G>
__global__ void __launch_bounds__(threads_per_block, blocks_at_least<Rule>)
    step_rows(const __grid_constant__ StepBatch<Rule> batch) {
    if (batch.found_inf != nullptr && *batch.found_inf != 0.0f) return;
    // Two passes: what is rare, in the loop of what is not, would take its registers.
    uint32_t left_over = 0;
    static_assert(blocks_per_warp <= 32, "a bit for each");
    if constexpr (!Rule::stateless) {
        const LaneStates<Rule, Coding> lane_states;
        each_block(batch, [&](const StepRow<Rule>& row, int64_t block, const StepScalars<Rule>& scalars, int i) {
            const bool done = step_usual(row, Block<Rule, P, G>(row, block), scalars, lane_states);
            left_over |= done ? 0u : 1u << i;
        });
        if (left_over == 0) return;
    }
    each_block(batch, [&](const StepRow<Rule>& row, int64_t block, const StepScalars<Rule>& scalars, int i) {
        if (!Rule::stateless && (left_over >> i & 1) == 0) return;
        step_unusual<Coding>(row, Block<Rule, P, G>(row, block), block, scalars);
    });
}

OPTIM8_END
