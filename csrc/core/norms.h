// The norms of a tensor that a rule may depend on, with the same bits on every backend and for any number of threads:
// their squares are added up in one order.
//
// Within a block, float32 squares are added by halves: those 128 apart, then sums 64 apart, and so on to neighbours.
// Where that leaves the range in which float32 has its precision, they are added so in float64. Blocks are added in
// float64: a chunk of 1024 by 32 lanes, each of which takes every 32nd block, and then by halves of the lanes; chunks
// one after the other. A value that is not there counts as 0.
#pragma once

#include "core/hyper.h"

OPTIM8_BEGIN

constexpr int norms = 2;  // of a rule that has some
constexpr int sum_lanes = 32;
constexpr int64_t chunk_blocks = 1024;

// Whether float32 squares that have this sum lost nothing that matters to those of them that are subnormal, and
// overflowed nowhere. Not where there was nothing to add, since squares of small numbers are 0 too.
OPTIM8_HD bool adds_up(float sum) { return sum >= 0x1p-100f && sum < 0x1p126f; }

// Of an element, the numbers whose norms are taken. One that is not finite counts as it would had its gradient been 0,
// or as 0: the other elements of its tensor do not notice it.
template <class Rule, int n>
OPTIM8_HD void measure_finite(float param, float grad, const float (&state)[n], const typename Rule::Scalars& scalars,
                              float (&of)[norms]) {
    Rule::measure(param, grad, state, scalars, of);
    if (!is_finite(of[0]) || !is_finite(of[1])) Rule::measure(param, 0.0f, state, scalars, of);
    for (float& number : of) number = is_finite(number) ? number : 0.0f;
}

// The scalars of a row; `sums`: of its tensor's squares.
template <class Rule>
OPTIM8_HD StepScalars<Rule> trusted(StepScalars<Rule> scalars, const double* sums) {
    if constexpr (Rule::has_norms) scalars.of_rule = Rule::trust(scalars.of_rule, sqrt(sums[0]), sqrt(sums[1]));
    return scalars;
}

// The sum of a power of two of values, which it changes.
template <class T>
T sum_by_halves(T* values, int count) {
    for (int half = count / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) values[i] += values[i + half];
    return values[0];
}

// Adds up the sums of a tensor's blocks, in parts as they come.
class BlockSums {
  public:
    void add(const double* of_blocks, int64_t blocks) {
        for (int64_t b = 0; b < blocks; ++b) {
            for (int n = 0; n < norms; ++n) lanes_[n][blocks_ % sum_lanes] += of_blocks[norms * b + n];
            if (++blocks_ == chunk_blocks) end_chunk();
        }
    }
    void put(double* sums) {
        end_chunk();
        for (int n = 0; n < norms; ++n) sums[n] = sums_[n];
    }

  private:
    void end_chunk() {
        for (int n = 0; n < norms; ++n) {
            sums_[n] += sum_by_halves(lanes_[n], sum_lanes);
            for (double& lane : lanes_[n]) lane = 0;
        }
        blocks_ = 0;
    }
    double lanes_[norms][sum_lanes] = {}, sums_[norms] = {};
    int64_t blocks_ = 0;  // of the present chunk
};

OPTIM8_END
