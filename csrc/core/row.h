// One tensor of a step: addresses, size, and how its numbers are stored. Bindings hand it to the kernels. Every rule
// has the same struct, since it is short; code to which the size matters (the launch table of CUDA) has a struct of
// its own for each rule.
#pragma once

#include "core/hyper.h"
#include "core/weight.h"

namespace optim8 {

enum class Precision : uint8_t { Bits8, Bits16, Bits32 };

struct Row {
    void* param;
    const void* grad;
    void* state[max_states];     // uint8 codes, or float32; null behind the rule's last state
    uint8_t* low[max_states];    // the low bytes of a state in 16 bits, or null
    void* param_low;             // int16 or uint8, the low bits of a weight wider than its parameter, or null
    float* absmax[max_states];   // one for each block of step_block values; null with 32-bit state
    int64_t size;                // values
    uint32_t first_block;        // where its blocks begin in the whole parameter, of which the tensor may be a part
    uint32_t first_in_block;     // and at which value of that block the tensor begins
    const AnyScalars* scalars;   // unless derived on the device:
    float* device_step;          // the count of steps in device memory; null where it is on the host, or not kept
    float* device_running;       // the scalar `running` of the rule, beside that
    const StepOptions* options;  // what scalars are derived from
    double* sums;                // of a rule with norms: of both the sum of squares (core/norms.h), else null
    double* of_blocks;           // the same of each block, while they are measured
    RuleId rule;
    Storage param_storage, grad_storage;
    Precision precision;
    Weight weight;
    Rounding rounding;  // of state in codes
    bool direct;        // StepOptions::direct
};

constexpr int64_t blocks_of(int64_t size, int64_t blocksize) { return size / blocksize + (size % blocksize != 0); }

// Bytes of a value in `state`.
constexpr int64_t bytes_of(Precision precision) { return precision == Precision::Bits32 ? 4 : 1; }

}  // namespace optim8

OPTIM8_BEGIN

// work(Coding) for a row of a rule with state in codes. Only the functional API keeps states themselves where a rule
// has roots.
template <class Rule, class Work>
auto with_coding(const Row& row, const Work& work) {
    if constexpr (Rule::stateless) {
        return work(Coding<Rounding::Nearest, true>{});
    } else {
        if constexpr (has_roots<Rule>() && Rule::functional_name != nullptr)
            if (row.direct) return work(Coding<Rounding::Nearest, false>{});
        if (row.precision == Precision::Bits16) {
            if (row.rounding == Rounding::Dithered) return work(Coding<Rounding::Dithered, true, true>{});
            return work(Coding<Rounding::Nearest, true, true>{});
        }
        if (row.rounding == Rounding::Dithered) return work(Coding<Rounding::Dithered, true>{});
        return work(Coding<Rounding::Nearest, true>{});
    }
}

OPTIM8_END
