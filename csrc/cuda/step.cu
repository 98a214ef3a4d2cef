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
#include <vector>

OPTIM8_BEGIN
namespace {

// Parameters of a kernel may take 32764 bytes from CUDA 12.1 on; these stay within 26 KB.
constexpr int step_rows_per_launch = 352;
constexpr int scalars_per_launch = 8;
constexpr int hypers_per_launch = 16;
constexpr int64_t blocks_per_warp = 4;  // consecutive ones, once there is enough work for every warp of a GPU
constexpr int64_t plenty_of_blocks = 1 << 16;

struct StepBatch {
    int32_t rows, blocks_per_warp;
    const float* found_inf;         // null: never skipped
    const Scalars* device_scalars;  // null: they stand below
    Scalars scalars[scalars_per_launch];
    int64_t first[step_rows_per_launch + 1];  // of each row, its first block in the batch
    StepRow row[step_rows_per_launch];
};
static_assert(sizeof(StepBatch) <= 26 * 1024, "beside the limit, parameters cost time at every launch");

struct CountBatch {
    int32_t rows;
    const float *grad_scale, *found_inf;
    Scalars* scalars;
    Hyper hyper[hypers_per_launch];
    float* step[step_rows_per_launch];
    uint8_t hyper_of[step_rows_per_launch];
};

// The row that block b of the batch belongs to.
OPTIM8_DEVICE int row_of(const StepBatch& batch, int64_t b) {
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
template <class Visit>
OPTIM8_DEVICE void each_block(const StepBatch& batch, const Visit& visit) {
    const int64_t begin = warp_of_grid() * batch.blocks_per_warp;
    const int64_t left = batch.first[batch.rows] - begin;
    const int count = left < batch.blocks_per_warp ? static_cast<int>(left) : batch.blocks_per_warp;
    int r = count > 0 ? row_of(batch, begin) : 0;
    for (int i = 0; i < count; ++r) {
        const StepRow& row = batch.row[r];
        const Scalars scalars =
            batch.device_scalars != nullptr ? batch.device_scalars[row.scalars] : batch.scalars[row.scalars];
        int64_t block = begin + i - batch.first[r];
        const int64_t end = batch.first[r + 1] - batch.first[r];
        for (; i < count && block < end; ++i, ++block) visit(row, block, scalars, i);
    }
}

template <class Rule, class P, class G>
__global__ void __launch_bounds__(threads_per_block, 4) step_rows(const __grid_constant__ StepBatch batch) {
    if (batch.found_inf != nullptr && *batch.found_inf != 0.0f) return;
    // Two passes: what is rare, in the loop of what is not, would take its registers.
    uint32_t left_over = 0;
    const LaneCodes<Rule> lane_codes;
    static_assert(blocks_per_warp <= 32, "a bit for each");
    each_block(batch, [&](const StepRow& row, int64_t block, const Scalars& scalars, int i) {
        const Block<Rule, P, G> at(row, block);
        const bool done = row.precision == Precision::Bits8 && at.well && step_quickly(at, scalars, lane_codes);
        left_over |= done ? 0u : 1u << i;
    });
    if (left_over == 0) return;
    each_block(batch, [&](const StepRow& row, int64_t block, const Scalars& scalars, int i) {
        if ((left_over >> i & 1) == 0) return;
        const Block<Rule, P, G> at(row, block);
        if (row.precision == Precision::Bits32)
            step_32bit(row, at, block * step_block, scalars);
        else
            step_carefully(at, scalars);
    });
}

// Counts the step of every row and derives its scalars, one thread a row; nothing where the step is to be skipped.
__global__ void __launch_bounds__(threads_per_block, 4) count_steps(const __grid_constant__ CountBatch batch) {
    const int r = static_cast<int>(blockIdx.x * threads_per_block + threadIdx.x);
    if (r >= batch.rows) return;
    if (batch.found_inf != nullptr && *batch.found_inf != 0.0f) return;
    Hyper hyper = batch.hyper[batch.hyper_of[r]];
    if (hyper.device_lr != nullptr) hyper.lr = *hyper.device_lr;
    if (batch.grad_scale != nullptr) hyper.gradient_scale = 1.0 / *batch.grad_scale;
    const float step = *batch.step[r] + 1.0f;
    *batch.step[r] = step;
    batch.scalars[r] = derive(hyper, step);
}

constexpr const char* who = "optimizer step";
using Kernel = void (*)(StepBatch);

template <class Rule>
Kernel kernel_of_types(Storage param, Storage grad) {
    const bool wide = grad == Storage::Float32;
    switch (param) {
        case Storage::BFloat16:
            return wide ? step_rows<Rule, bfloat16, float> : step_rows<Rule, bfloat16, bfloat16>;
        case Storage::Float16:
            return wide ? step_rows<Rule, float16, float> : step_rows<Rule, float16, float16>;
        default:
            return step_rows<Rule, float, float>;
    }
}

Kernel kernel_of(const Row& row) {
    switch (row.rule) {
#define OPTIM8_KERNEL_CASE(name, type) \
    case RuleId::name: \
        return kernel_of_types<type>(row.param_storage, row.grad_storage);
        OPTIM8_RULES(OPTIM8_KERNEL_CASE)
#undef OPTIM8_KERNEL_CASE
    }
    return nullptr;
}

bool fits_packets(const Row& row) {
    uintptr_t all = reinterpret_cast<uintptr_t>(row.param) | reinterpret_cast<uintptr_t>(row.grad);
    for (void* state : row.state) all |= reinterpret_cast<uintptr_t>(state);
    return all % 16 == 0;
}

// The rows of one kernel and one kind of scalars, launched whenever a table is full.
class Batcher {
  public:
    Batcher(const StepInputs& inputs, cudaStream_t stream)
        : inputs_(inputs), stream_(stream), batch_(new StepBatch{}) {}

    void add(const Row& row, int64_t index) {
        if (row.size == 0) return;
        const bool on_device = inputs_.scalars != nullptr;
        int scalars = on_device ? static_cast<int>(index) : place_of(row.scalars);
        if (batch_->rows == step_rows_per_launch || scalars < 0) {
            flush(row);
            if (!on_device) scalars = place_of(row.scalars);
        }
        StepRow& to = batch_->row[batch_->rows];
        to = StepRow{row.param, row.grad, {}, {}, row.size, scalars, row.precision, fits_packets(row)};
        for (int s = 0; s < max_states; ++s) {
            to.state[s] = row.state[s];
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
        launch(who, kernel_of(row), blocks_of(blocks, batch_->blocks_per_warp), stream_, *batch_);
        batch_->rows = 0;
        used_ = 0;
    }

  private:
    // Where the batch holds these scalars, put there if need be; -1 where there is no room.
    int place_of(const Scalars& scalars) {
        for (int i = 0; i < used_; ++i)
            if (std::memcmp(&batch_->scalars[i], &scalars, sizeof scalars) == 0) return i;
        if (used_ == scalars_per_launch) return -1;
        batch_->scalars[used_] = scalars;
        return used_++;
    }

    const StepInputs& inputs_;
    cudaStream_t stream_;
    std::unique_ptr<StepBatch> batch_;
    int used_ = 0;
};

// Launches count_steps over the rows that count on the device, as often as its tables fill.
void count_on_device(const Row* rows, int64_t count, const StepInputs& inputs, cudaStream_t stream) {
    const auto batch = std::make_unique<CountBatch>();
    const Hyper* hypers[hypers_per_launch];
    for (int64_t i = 0; i < count;) {
        int used = 0;
        *batch = CountBatch{};
        batch->grad_scale = inputs.grad_scale;
        batch->found_inf = inputs.found_inf;
        batch->scalars = inputs.scalars + i;
        for (; i < count && batch->rows < step_rows_per_launch; ++i) {
            int h = static_cast<int>(std::find(hypers, hypers + used, rows[i].hyper) - hypers);
            if (h == hypers_per_launch) break;
            if (h == used) {
                hypers[used++] = rows[i].hyper;
                batch->hyper[h] = *rows[i].hyper;
            }
            batch->step[batch->rows] = rows[i].device_step;
            batch->hyper_of[batch->rows++] = static_cast<uint8_t>(h);
        }
        launch(who, count_steps, blocks_of(batch->rows, warp_size), stream, *batch);
    }
}

}  // namespace
OPTIM8_END

void optim8::cuda_step(const Row* rows, int64_t count, const StepInputs& inputs, cudaStream_t stream) {
    if (count == 0) return;
    if (inputs.scalars != nullptr) count_on_device(rows, count, inputs, stream);
    // Rows of one kernel side by side, otherwise in their order.
    const auto kind = [&](int64_t i) {
        return std::make_tuple(rows[i].rule, rows[i].param_storage, rows[i].grad_storage);
    };
    std::vector<int64_t> order(static_cast<size_t>(count));
    std::iota(order.begin(), order.end(), int64_t{0});
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return kind(a) < kind(b); });
    Batcher batcher(inputs, stream);
    for (size_t i = 0; i < order.size(); ++i) {
        if (i > 0 && kind(order[i]) != kind(order[i - 1])) batcher.flush(rows[order[i - 1]]);
        batcher.add(rows[order[i]], order[i]);
    }
    batcher.flush(rows[order.back()]);
}
