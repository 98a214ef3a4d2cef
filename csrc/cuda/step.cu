// One optimizer step over many tensors in one launch, for any rule, with 8- or 32-bit state. Names no rule.
//
// A block of 256 values belongs to one warp, eight values a lane: load, decode, update, block maximum by shuffles,
// encode, store. No shared memory, no barrier. The tensors' addresses travel in the kernel's parameters.
#include "cuda/step_any_block.h"
#include "cuda/step_batch.h"

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

// Blocks of threads that a multiprocessor is to hold at least, which bounds the registers of a thread: by 128, or with
// three states by 168.
template <class Rule>
constexpr int blocks_at_least = state_count<Rule> == 3 ? 3 : 4;

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
            const Block<Rule, P, G> at(row, block);
            const bool done = row.precision != Precision::Bits32 && at.weight == Weight::Plain && at.well &&
                              step_quickly<Coding>(at, scalars, lane_states);
            left_over |= done ? 0u : 1u << i;
        });
        if (left_over == 0) return;
    }
    each_block(batch, [&](const StepRow<Rule>& row, int64_t block, const StepScalars<Rule>& scalars, int i) {
        if (!Rule::stateless && (left_over >> i & 1) == 0) return;
        const Block<Rule, P, G> at(row, block);
        if constexpr (!Rule::stateless)
            if (row.precision != Precision::Bits32) return step_carefully<Coding>(at, scalars);
        step_32bit(row, at, block * step_block, scalars);
    });
}

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
    launch_rows<Rule>(kernel_of<Rule>, rows, count, inputs, stream);
}

}  // namespace
OPTIM8_END

void optim8::cuda_count(const Row* rows, int64_t count, const StepInputs& inputs, cudaStream_t stream) {
    each_rule(rows, count, inputs, [&](const Row* of_rule, int64_t many, const StepInputs& with) {
        switch (of_rule->rule) {
#define OPTIM8_COUNT_CASE(name, type) \
    case RuleId::name: \
        return count_on_device<type>(of_rule, many, with, stream);
            OPTIM8_RULES(OPTIM8_COUNT_CASE)
#undef OPTIM8_COUNT_CASE
        }
    });
}

void optim8::cuda_step(const Row* rows, int64_t count, const StepInputs& inputs, cudaStream_t stream) {
    if (count > 0 && rows->scalars == nullptr && !inputs.counted) cuda_count(rows, count, inputs, stream);
    each_rule(rows, count, inputs, [&](const Row* of_rule, int64_t many, const StepInputs& with) {
        switch (of_rule->rule) {
#define OPTIM8_STEP_CASE(name, type) \
    case RuleId::name: \
        return step_rule<type>(of_rule, many, with, stream);
            OPTIM8_RULES(OPTIM8_STEP_CASE)
#undef OPTIM8_STEP_CASE
        }
    });
}
