// One optimizer step over many tensors in one launch, for any rule, with 8- or 32-bit state. Names no rule.
//
// A block of 256 values belongs to one warp, eight values a lane: load, decode, update, block maximum by shuffles,
// encode, store. No shared memory, no barrier. The tensors' addresses travel in the kernel's parameters.
#include "cuda/kernels.h"
#include "cuda/step_any_block.h"
#include "cuda/step_block.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

OPTIM8_BEGIN
namespace {

// Parameters of a kernel may take 32764 bytes from CUDA 12.1 on; beside 26 KB, they cost time at every launch.
constexpr size_t bytes_per_launch = 26 * 1024;
constexpr int scalars_per_launch = 8;
constexpr int hypers_per_launch = 16;
constexpr int64_t blocks_per_warp = 4;  // consecutive ones, once there is enough work for every warp of a GPU
constexpr int64_t plenty_of_blocks = 1 << 16;

template <class Rule>
constexpr int rows_per_launch = (bytes_per_launch - 64 - scalars_per_launch * sizeof(StepScalars<Rule>)) /
                                (sizeof(StepRow<Rule>) + sizeof(int64_t));

template <class Rule>
struct StepBatch {
    int32_t rows, blocks_per_warp;
    const float* found_inf;            // null: never skipped
    const AnyScalars* device_scalars;  // null: they stand below
    StepScalars<Rule> scalars[scalars_per_launch];
    int64_t first[rows_per_launch<Rule> + 1];  // of each row, its first block in the batch
    StepRow<Rule> row[rows_per_launch<Rule>];
};

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

// The row that block b of the batch belongs to.
template <class Rule>
OPTIM8_DEVICE int row_of(const StepBatch<Rule>& batch, int64_t b) {
    int low = 0, high = batch.rows - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (batch.first[middle] <= b)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

// visit(row, block of the row, scalars, which it is of the warp's) for each of the warp's blocks.
template <class Rule, class Visit>
OPTIM8_DEVICE void each_block(const StepBatch<Rule>& batch, const Visit& visit) {
    const int64_t begin = warp_of_grid() * batch.blocks_per_warp;
    const int64_t left = batch.first[batch.rows] - begin;
    const int count = left < batch.blocks_per_warp ? static_cast<int>(left) : batch.blocks_per_warp;
    int r = count > 0 ? row_of(batch, begin) : 0;
    for (int i = 0; i < count; ++r) {
        const StepRow<Rule>& row = batch.row[r];
        const StepScalars<Rule> scalars =
            batch.device_scalars != nullptr
                ? *reinterpret_cast<const StepScalars<Rule>*>(batch.device_scalars + row.scalars)
                : batch.scalars[row.scalars];
        int64_t block = begin + i - batch.first[r];
        const int64_t end = batch.first[r + 1] - batch.first[r];
        for (; i < count && block < end; ++i, ++block) visit(row, block, scalars, i);
    }
}

template <class Rule, class Coding, class P, class G>
__global__ void __launch_bounds__(threads_per_block, 4) step_rows(const __grid_constant__ StepBatch<Rule> batch) {
    if (batch.found_inf != nullptr && *batch.found_inf != 0.0f) return;
    // Two passes: what is rare, in the loop of what is not, would take its registers.
    uint32_t left_over = 0;
    static_assert(blocks_per_warp <= 32, "a bit for each");
    if constexpr (!Rule::stateless) {
        const LaneStates<Rule, Coding> lane_states;
        each_block(batch, [&](const StepRow<Rule>& row, int64_t block, const StepScalars<Rule>& scalars, int i) {
            const Block<Rule, P, G> at(row, block);
            const bool done =
                row.precision != Precision::Bits32 && at.well && step_quickly<Coding>(at, scalars, lane_states);
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
    if constexpr (!Rule::stateless) *batch.step[r] = step = *batch.step[r] + 1.0f;
    if constexpr (Rule::running != nullptr) running = *batch.running[r];
    *reinterpret_cast<StepScalars<Rule>*>(batch.scalars + r) = derive<Rule>(hypers, step, running);
    if constexpr (Rule::running != nullptr) *batch.running[r] = running;
}

constexpr const char* who = "optimizer step";

template <class Rule>
using Kernel = void (*)(StepBatch<Rule>);

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

bool fits_packets(const Row& row) {
    uintptr_t all = reinterpret_cast<uintptr_t>(row.param) | reinterpret_cast<uintptr_t>(row.grad);
    for (void* state : row.state) all |= reinterpret_cast<uintptr_t>(state);
    for (uint8_t* low : row.low) all |= reinterpret_cast<uintptr_t>(low);
    return all % 16 == 0;
}

// The rows of one kernel and one kind of scalars, launched whenever a table is full.
template <class Rule>
class Batcher {
  public:
    Batcher(const StepInputs& inputs, cudaStream_t stream)
        : inputs_(inputs), stream_(stream), batch_(new StepBatch<Rule>{}) {}

    void add(const Row& row, int64_t index) {
        if (row.size == 0) return;
        const bool on_device = inputs_.scalars != nullptr;
        int scalars = on_device ? static_cast<int>(index) : place_of(row);
        if (batch_->rows == rows_per_launch<Rule> || scalars < 0) {
            flush(row);
            if (!on_device) scalars = place_of(row);
        }
        StepRow<Rule>& to = batch_->row[batch_->rows];
        to = StepRow<Rule>{row.param,     row.grad,         {}, {}, {}, row.size, scalars, row.first_block,
                           row.precision, fits_packets(row)};
        for (int s = 0; s < state_count<Rule>; ++s) {
            to.state[s] = row.state[s];
            to.low[s] = row.low[s];
            to.absmax[s] = row.absmax[s];
        }
        const int64_t before = batch_->first[batch_->rows++];
        batch_->first[batch_->rows] = before + blocks_of(row.size, step_block);
    }

    // Launches what was gathered; `row` is any of its kind.
    void flush(const Row& row) {
        const int64_t blocks = batch_->first[batch_->rows];
        batch_->blocks_per_warp = blocks < plenty_of_blocks ? 1 : static_cast<int>(blocks_per_warp);
        batch_->found_inf = inputs_.found_inf;
        batch_->device_scalars = inputs_.scalars;
        launch(who, kernel_of<Rule>(row), blocks_of(blocks, batch_->blocks_per_warp), stream_, *batch_);
        batch_->rows = 0;
        used_ = 0;
    }

  private:
    // Where the batch holds the row's scalars, put there if need be; -1 where there is no room.
    int place_of(const Row& row) {
        const StepScalars<Rule> scalars = scalars_of<Rule>(*row.scalars);
        for (int i = 0; i < used_; ++i)
            if (std::memcmp(&batch_->scalars[i], &scalars, sizeof scalars) == 0) return i;
        if (used_ == scalars_per_launch) return -1;
        batch_->scalars[used_] = scalars;
        return used_++;
    }

    const StepInputs& inputs_;
    cudaStream_t stream_;
    std::unique_ptr<StepBatch<Rule>> batch_;
    int used_ = 0;
};

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
        launch(who, count_steps<Rule>, blocks_of(batch->rows, warp_size), stream, *batch);
    }
}

// A step of rows of one rule.
template <class Rule>
void step_rule(const Row* rows, int64_t count, const StepInputs& inputs, cudaStream_t stream) {
    if (inputs.scalars != nullptr) count_on_device<Rule>(rows, count, inputs, stream);
    // Rows of one kernel side by side, otherwise in their order.
    const auto kind = [&](int64_t i) {
        return std::make_tuple(rows[i].param_storage, rows[i].grad_storage, rows[i].rounding, rows[i].direct,
                               rows[i].precision == Precision::Bits16);
    };
    std::vector<int64_t> order(static_cast<size_t>(count));
    std::iota(order.begin(), order.end(), int64_t{0});
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return kind(a) < kind(b); });
    Batcher<Rule> batcher(inputs, stream);
    for (size_t i = 0; i < order.size(); ++i) {
        if (i > 0 && kind(order[i]) != kind(order[i - 1])) batcher.flush(rows[order[i - 1]]);
        batcher.add(rows[order[i]], order[i]);
    }
    batcher.flush(rows[order.back()]);
}

}  // namespace
OPTIM8_END

void optim8::cuda_step(const Row* rows, int64_t count, const StepInputs& inputs, cudaStream_t stream) {
    for (int64_t begin = 0, end; begin < count; begin = end) {
        for (end = begin + 1; end < count && rows[end].rule == rows[begin].rule; ++end) {
        }
        StepInputs of_run = inputs;
        if (inputs.scalars != nullptr) of_run.scalars += begin;
        switch (rows[begin].rule) {
#define OPTIM8_STEP_CASE(name, type) \
    case RuleId::name: \
        step_rule<type>(rows + begin, end - begin, of_run, stream); \
        break;
            OPTIM8_RULES(OPTIM8_STEP_CASE)
#undef OPTIM8_STEP_CASE
        }
    }
}
