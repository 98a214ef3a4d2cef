// Rows side by side in the parameters of one launch, and what the kernels over them share.
#pragma once

#include "core/norms.h"
#include "cuda/kernels.h"
#include "cuda/step_block.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

OPTIM8_BEGIN

// Parameters of a kernel may take 32764 bytes from CUDA 12.1 on; beside 26 KB, they cost time at every launch.
constexpr size_t bytes_per_launch = 26 * 1024;
constexpr int scalars_per_launch = 8;
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

// The row of a batch that its b-th item belongs to, a block or whatever it counts.
template <class Batch>
OPTIM8_DEVICE int row_of(const Batch& batch, int64_t b) {
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

template <class Rule>
OPTIM8_DEVICE StepScalars<Rule> scalars_of(const StepBatch<Rule>& batch, const StepRow<Rule>& row) {
    return batch.device_scalars != nullptr
               ? *reinterpret_cast<const StepScalars<Rule>*>(batch.device_scalars + row.scalars)
               : batch.scalars[row.scalars];
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
        const StepScalars<Rule> scalars = scalars_of(batch, row);
        int64_t block = begin + i - batch.first[r];
        const int64_t end = batch.first[r + 1] - batch.first[r];
        for (; i < count && block < end; ++i, ++block) visit(row, block, scalars, i);
    }
}

// What an error calls all of this.
constexpr const char* step_name = "optimizer step";

template <class Rule>
using Kernel = void (*)(StepBatch<Rule>);

inline uint8_t packed_of(const Row& row) {
    const auto fits = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
    bool states = true;
    for (const void* state : row.state) states = states && fits(state);
    for (const uint8_t* low : row.low) states = states && fits(low);
    const bool param = fits(row.param) && fits(row.param_low);
    return static_cast<uint8_t>((states ? packed_states : 0) | (param ? packed_param : 0) |
                                (fits(row.grad) ? packed_grad : 0));
}

// The rows of one kernel and one kind of scalars, launched whenever a table is full.
template <class Rule>
class Batcher {
  public:
    using KernelOf = Kernel<Rule>(const Row&);
    // Launches a batch of rows like this one in another way; false, where that is not done.
    using LaunchMany = bool(const StepBatch<Rule>&, const Row&, cudaStream_t);
    Batcher(KernelOf& kernel_of, LaunchMany* launch_many, const StepInputs& inputs, cudaStream_t stream)
        : kernel_of_(kernel_of),
          launch_many_(launch_many),
          inputs_(inputs),
          stream_(stream),
          batch_(new StepBatch<Rule>{}) {}

    void add(const Row& row, int64_t index) {
        if (row.size == 0) return;
        const bool on_device = inputs_.scalars != nullptr;
        int scalars = on_device ? static_cast<int>(index) : place_of(row);
        if (batch_->rows == rows_per_launch<Rule> || scalars < 0) {
            flush(row);
            if (!on_device) scalars = place_of(row);
        }
        StepRow<Rule>& to = batch_->row[batch_->rows];
        to = StepRow<Rule>{{},
                           row.param,
                           row.grad,
                           row.param_low,
                           {},
                           {},
                           {},
                           row.size,
                           scalars,
                           row.first_block,
                           row.first_in_block,
                           row.precision,
                           row.weight,
                           packed_of(row)};
        if constexpr (Rule::has_norms) to.of_blocks = row.of_blocks;
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
        if (launch_many_ == nullptr || !launch_many_(*batch_, row, stream_))
            launch(step_name, kernel_of_(row), blocks_of(blocks, batch_->blocks_per_warp), stream_, *batch_);
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

    KernelOf& kernel_of_;
    LaunchMany* launch_many_;
    const StepInputs& inputs_;
    cudaStream_t stream_;
    std::unique_ptr<StepBatch<Rule>> batch_;
    int used_ = 0;
};

// Launches a kernel over rows of one rule; where that is given, `launch_many` before.
template <class Rule>
void launch_rows(Kernel<Rule> (&kernel_of)(const Row&), typename Batcher<Rule>::LaunchMany* launch_many,
                 const Row* rows, int64_t count, const StepInputs& inputs, cudaStream_t stream) {
    // Rows of one kernel side by side, otherwise in their order.
    const auto kind = [&](int64_t i) {
        return std::make_tuple(rows[i].param_storage, rows[i].grad_storage, rows[i].rounding, rows[i].direct,
                               rows[i].precision == Precision::Bits16);
    };
    std::vector<int64_t> order(static_cast<size_t>(count));
    std::iota(order.begin(), order.end(), int64_t{0});
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return kind(a) < kind(b); });
    Batcher<Rule> batcher(kernel_of, launch_many, inputs, stream);
    for (size_t i = 0; i < order.size(); ++i) {
        if (i > 0 && kind(order[i]) != kind(order[i - 1])) batcher.flush(rows[order[i - 1]]);
        batcher.add(rows[order[i]], order[i]);
    }
    batcher.flush(rows[order.back()]);
}

// work(first row, count, inputs) for each run of rows of the same rule; those of a rule with norms have `sums` and
// `of_blocks` where `inputs` has them.
template <class Work>
void each_rule(const Row* rows, int64_t count, const StepInputs& inputs, const Work& work) {
    std::vector<Row> of_run;
    double* of_blocks = inputs.of_blocks;
    for (int64_t begin = 0, end; begin < count; begin = end) {
        of_run.clear();
        for (end = begin; end < count && rows[end].rule == rows[begin].rule; ++end) {
            if (inputs.sums == nullptr) continue;
            of_run.push_back(rows[end]);
            of_run.back().sums = inputs.sums + norms * end;
            of_run.back().of_blocks = of_blocks;
            if (of_blocks != nullptr) of_blocks += norms * blocks_of(rows[end].size, step_block);
        }
        StepInputs inputs_of_run = inputs;
        if (inputs.scalars != nullptr) inputs_of_run.scalars += begin;
        work(inputs.sums == nullptr ? rows + begin : of_run.data(), end - begin, inputs_of_run);
    }
}

OPTIM8_END
