// One tensor of a step: addresses, size, and how its numbers are stored. What bindings hand to the kernels, for every
// rule the same struct: it is short, and what takes part by its size (the launch table of CUDA) has one of its own for
// each rule.
#pragma once

#include "core/hyper.h"
#include "core/storage.h"

namespace optim8 {

enum class Precision : uint8_t { Bits8, Bits32 };

struct Row {
    void* param;
    const void* grad;
    void* state[max_states];     // uint8 codes, or float32; null behind the rule's last state
    float* absmax[max_states];   // one for each block of step_block values; null with 32-bit state
    int64_t size;                // values
    const AnyScalars* scalars;   // unless derived on the device:
    float* device_step;          // the count of steps in device memory; null where it is on the host
    const StepOptions* options;  // what scalars are derived from
    RuleId rule;
    Storage param_storage, grad_storage;
    Precision precision;
};

constexpr int64_t blocks_of(int64_t size, int64_t blocksize) { return size / blocksize + (size % blocksize != 0); }

}  // namespace optim8
