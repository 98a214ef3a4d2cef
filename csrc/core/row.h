// One tensor of a step: addresses, size, and how its numbers are stored. What bindings hand to the kernels.
#pragma once

#include "core/rules/all.h"

namespace optim8 {

constexpr int max_states = 2;

enum class Storage : uint8_t { Float32, BFloat16, Float16 };
enum class Precision : uint8_t { Bits8, Bits32 };
enum class RuleId : uint8_t {
#define OPTIM8_RULE_ID(name, type) name,
    OPTIM8_RULES(OPTIM8_RULE_ID)
#undef OPTIM8_RULE_ID
};

struct Row {
    void* param;
    const void* grad;
    void* state[max_states];    // uint8 codes, or float32
    float* absmax[max_states];  // one for each block of step_block values; null with 32-bit state
    int64_t size;               // values
    Scalars scalars;            // unless derived on the device:
    float* device_step;         // the count of steps in device memory; null where it is on the host
    const Hyper* hyper;         // what scalars are derived from
    RuleId rule;
    Storage param_storage, grad_storage;
    Precision precision;
};

constexpr int64_t blocks_of(int64_t size, int64_t blocksize) { return size / blocksize + (size % blocksize != 0); }

}  // namespace optim8
