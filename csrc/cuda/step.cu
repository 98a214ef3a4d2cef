// Steps of rows of any rules.
#include "cuda/step_batch.h"
#include "cuda/step_parts.h"

void optim8::cuda_count(const Row* rows, int64_t count, const StepInputs& inputs, cudaStream_t stream) {
    each_rule(rows, count, inputs, [&](const Row* of_rule, int64_t many, const StepInputs& with) {
        with_part(of_rule->rule, [&](auto part) { count_part<decltype(part)::value>(of_rule, many, with, stream); });
    });
}

void optim8::cuda_step(const Row* rows, int64_t count, const StepInputs& inputs, cudaStream_t stream) {
    if (count > 0 && rows->scalars == nullptr && !inputs.counted) cuda_count(rows, count, inputs, stream);
    each_rule(rows, count, inputs, [&](const Row* of_rule, int64_t many, const StepInputs& with) {
        with_part(of_rule->rule, [&](auto part) { step_part<decltype(part)::value>(of_rule, many, with, stream); });
    });
}
