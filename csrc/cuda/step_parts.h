// What the rules of one part (core/rule_parts.h) offer; rows are of one rule.
#pragma once

#include "core/rule_parts.h"
#include "cuda/kernels.h"

OPTIM8_BEGIN

template <int part>
void count_part(const Row* rows, int64_t count, const StepInputs& inputs, cudaStream_t stream);
template <int part>
void step_part(const Row* rows, int64_t count, const StepInputs& inputs, cudaStream_t stream);

OPTIM8_END
