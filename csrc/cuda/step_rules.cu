// The launches of a step, for the rules of one part. Names no rule.
#include "cuda/step_columns.h"
#include "cuda/step_parts.h"

#include <algorithm>
#include <cstring>
#include <memory>

OPTIM8_BEGIN
namespace {

constexpr int hypers_per_launch = 16;

template <class Rule>
struct CountBatch {
    static constexpr int rows_per_launch = 352;
    int32_t rows;
    const float *grad_scale, *found_inf;
    AnyScalars* scalars;
    StepHypers<Rule> hypers[hypers_per_launch];
    float* step[rows_per_launch];  // null where none is kept
    float* running[Rule::running != nullptr ? rows_per_launch : 1];
    uint8_t hypers_of[rows_per_launch];
};

// Counts the step of every row and derives its scalars, one thread a row; nothing where the step is to be skipped.
template <class Rule>
__global__ void __launch_bounds__(threads_per_block, 4) count_steps(const __grid_constant__ CountBatch<Rule> batch) {
    const int r = static_cast<int>(blockIdx.x * threads_per_block + threadIdx.x);
    if (r >= batch.rows) return;
    if (batch.found_inf != nullptr && *batch.found_inf != 0.0f) return;
    StepHypers<Rule> hypers = batch.hypers[batch.hypers_of[r]];
    if (hypers.device_lr != nullptr) hypers.of_rule.lr = *hypers.device_lr;
    if (batch.grad_scale != nullptr) hypers.gradient_scale = 1.0 / *batch.grad_scale;
    float step = 1.0f, running = Rule::running_start;
    if (!Rule::stateless || batch.step[r] != nullptr) *batch.step[r] = step = *batch.step[r] + 1.0f;
    if constexpr (Rule::running != nullptr) running = *batch.running[r];
    *reinterpret_cast<StepScalars<Rule>*>(batch.scalars + r) = derive<Rule>(hypers, step, running);
    if constexpr (Rule::running != nullptr) *batch.running[r] = running;
}

template <class Rule>
Kernel<Rule> kernel_of(const Row& row) {
    const bool wide = row.grad_storage == Storage::Float32;
    return with_coding<Rule>(row, [&](auto coding) {
        using Way = decltype(coding);
        return with_storage(row.param_storage, [&](auto stored) -> Kernel<Rule> {
            using P = typename decltype(stored)::type;
            return wide ? step_rows<Rule, Way, P, float> : step_rows<Rule, Way, P, P>;
        });
    });
}

// Launches count_steps over the rows that count on the device, as often as its tables fill.
template <class Rule>
void count_on_device(const Row* rows, int64_t count, const StepInputs& inputs, cudaStream_t stream) {
    using Batch = CountBatch<Rule>;
    const auto batch = std::make_unique<Batch>();
    const StepOptions* options[hypers_per_launch];
    for (int64_t i = 0; i < count;) {
        int used = 0;
        *batch = Batch{};
        batch->grad_scale = inputs.grad_scale;
        batch->found_inf = inputs.found_inf;
        batch->scalars = inputs.scalars + i;
        for (; i < count && batch->rows < Batch::rows_per_launch; ++i) {
            int h = static_cast<int>(std::find(options, options + used, rows[i].options) - options);
            if (h == hypers_per_launch) break;
            if (h == used) {
                options[used++] = rows[i].options;
                batch->hypers[h] = hypers_of<Rule>(*rows[i].options);
            }
            batch->step[batch->rows] = rows[i].device_step;
            if constexpr (Rule::running != nullptr) batch->running[batch->rows] = rows[i].device_running;
            batch->hypers_of[batch->rows++] = static_cast<uint8_t>(h);
        }
        launch(step_name, count_steps<Rule>, blocks_of(batch->rows, warp_size), stream, *batch);
    }
}

template <class Rule>
struct TrustBatch {
    static constexpr int rows_per_launch = 2048;
    int32_t rows;
    const float* found_inf;
    const double* sums;
    AnyScalars* scalars;
    bool derived;  // `scalars` hold what the norms are still to be put into
    StepScalars<Rule> host[hypers_per_launch];
    uint8_t which[rows_per_launch];
};

// The scalars of every row of a rule with norms, one thread a row.
template <class Rule>
__global__ void __launch_bounds__(threads_per_block, 4) trust_rows(const __grid_constant__ TrustBatch<Rule> batch) {
    const int r = static_cast<int>(blockIdx.x * threads_per_block + threadIdx.x);
    if (r >= batch.rows || (batch.found_inf != nullptr && *batch.found_inf != 0.0f)) return;
    auto* scalars = reinterpret_cast<StepScalars<Rule>*>(batch.scalars + r);
    *scalars = trusted<Rule>(batch.derived ? *scalars : batch.host[batch.which[r]], batch.sums + norms * r);
}

template <class Rule>
void trust_on_device(const Row* rows, int64_t count, const StepInputs& inputs, cudaStream_t stream) {
    using Batch = TrustBatch<Rule>;
    const auto batch = std::make_unique<Batch>();
    batch->found_inf = inputs.found_inf;
    batch->derived = rows->scalars == nullptr;
    for (int64_t i = 0; i < count;) {
        int used = 0;
        batch->rows = 0;
        batch->scalars = inputs.scalars + i;
        batch->sums = rows[i].sums;
        for (; i < count && batch->rows < Batch::rows_per_launch; ++i) {
            if (!batch->derived) {
                const StepScalars<Rule> scalars = scalars_of<Rule>(*rows[i].scalars);
                int h = 0;
                while (h < used && std::memcmp(&batch->host[h], &scalars, sizeof scalars) != 0) ++h;
                if (h == hypers_per_launch) break;
                if (h == used) batch->host[used++] = scalars;
                batch->which[batch->rows] = static_cast<uint8_t>(h);
            }
            ++batch->rows;
        }
        launch(step_name, trust_rows<Rule>, blocks_of(batch->rows, warp_size), stream, *batch);
    }
}

template <class Rule>
void step_rule(const Row* rows, int64_t count, const StepInputs& inputs, cudaStream_t stream) {
    if constexpr (Rule::has_norms) trust_on_device<Rule>(rows, count, inputs, stream);
    if constexpr (Rule::in_columns)
        launch_rows<Rule>(kernel_of<Rule>, launch_columns<Rule>, rows, count, inputs, stream);
    else
        launch_rows<Rule>(kernel_of<Rule>, nullptr, rows, count, inputs, stream);
}

}  // namespace

template <>
void count_part<OPTIM8_PART>(const Row* rows, int64_t count, const StepInputs& inputs, cudaStream_t stream) {
    with_rule<OPTIM8_PART>(
        rows->rule, [&](auto rule) { count_on_device<typename decltype(rule)::type>(rows, count, inputs, stream); });
}

template <>
void step_part<OPTIM8_PART>(const Row* rows, int64_t count, const StepInputs& inputs, cudaStream_t stream) {
    with_rule<OPTIM8_PART>(rows->rule,
                           [&](auto rule) { step_rule<typename decltype(rule)::type>(rows, count, inputs, stream); });
}

OPTIM8_END
