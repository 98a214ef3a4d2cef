// The squares of what the norms of a rule are taken of, added up over tensors in the order of core/norms.h: a launch
// over all blocks, and two small ones that add up those of chunks and of tensors. Changes no tensor.
#include "cuda/step_any_block.h"
#include "cuda/step_batch.h"

#include <memory>

OPTIM8_BEGIN
namespace {

// The sum of a tile by halves, in every lane. The lanes that exchange values each go on with half of them as long as
// they have several.
template <int span, class T>
OPTIM8_DEVICE T sum_of_tile(T (&x)[per_lane]) {
    static_assert(span == per_lane || 2 * span == per_lane, "only the highest bit of k may stand above the lanes'");
    if constexpr (span < per_lane)
        for (int k = 0; k < span; ++k) x[k] += x[k + span];
    int bit = warp_size / 2;
#pragma unroll
    for (int left = span / 2; left > 0; left /= 2, bit /= 2) {
        const bool upper = (lane() & bit) != 0;
#pragma unroll
        for (int k = 0; k < left; ++k) {
            const T other = __shfl_xor_sync(whole_warp, upper ? x[k] : x[k + left], bit);
            x[k] = (upper ? x[k + left] : x[k]) + other;
        }
    }
    T sum = x[0];
    for (; bit > 0; bit /= 2) sum += __shfl_xor_sync(whole_warp, sum, bit);
    // What is left are the places within a lane, the highest first; the highest bits of the lane tell them now.
    bit = warp_size / 2;
#pragma unroll
    for (int left = span / 2; left > 0; left /= 2, bit /= 2) sum += __shfl_xor_sync(whole_warp, sum, bit);
    return sum;
}

// The states of the lane's elements as they were.
template <class Coding, class Rule, class P, class G>
OPTIM8_DEVICE void load_states(const StepRow<Rule>& row, const Block<Rule, P, G>& block, int64_t at,
                               float (&state)[per_lane][state_count<Rule>]) {
    constexpr int span = packet_span<P>;
    if (Rule::stateless || row.precision == Precision::Bits32) {
        float values[per_lane] = {};
        for (int s = 0; s < state_count<Rule>; ++s) {
            if (s < kept_count<Rule>)
                load_tile<span>(static_cast<const float*>(row.state[s]) + at, block.count, block.well(packed_states),
                                0.0f, values);
            for (int k = 0; k < per_lane; ++k) state[k][s] = values[k];
        }
        return;
    }
    each_state<Rule>([&](auto s) {
        constexpr Code code = code_of<Rule, s.index>;
        constexpr bool low_bytes = Coding::template low<Rule, s.index>;
        uint8_t codes[per_lane], low[per_lane] = {};
        load_tile<span>(block.codes[s.index], block.count, block.well(packed_states), zero_code_of(code), codes);
        if constexpr (low_bytes)
            load_tile<span>(block.low[s.index], block.count, block.well(packed_states), middle_low, low);
        const float absmax = *block.absmax[s.index];
#pragma unroll
        for (int k = 0; k < per_lane; ++k)
            state[k][s.index] = restore<Coding::template root<Rule, s.index>>(
                decode_either<low_bytes, code>(codes[k], low[k]) * absmax);
    });
}

template <class Coding, class Rule, class P, class G>
OPTIM8_DEVICE void measure_block(const StepRow<Rule>& row, int64_t number, const StepScalars<Rule>& scalars) {
    constexpr int span = packet_span<P>;
    const Block<Rule, P, G> block(row, number);
    float param[per_lane];
    G grad[per_lane];
    float state[per_lane][state_count<Rule>], numbers[norms][per_lane];
    load_weights<span>(block, param);
    load_tile<span>(block.grad, block.count, block.well(packed_grad), G{}, grad);
    load_states<Coding>(row, block, number * step_block, state);
    bool good = true;
#pragma unroll
    for (int k = 0; k < per_lane; ++k) {
        Quick old[state_count<Rule>], of[norms];
        for (int s = 0; s < state_count<Rule>; ++s) old[s] = Quick(state[k][s]);
        Rule::measure(Quick(param[k]), Quick(to_float(grad[k]) * scalars.gradient_factor), old, scalars.of_rule, of);
        for (int n = 0; n < norms; ++n) {
            numbers[n][k] = of[n].x;
            good = good && of[n].in_range && is_finite(of[n].x);
        }
    }
    if (__any_sync(whole_warp, !good)) {
#pragma unroll  // so that no array needs an address
        for (int k = 0; k < per_lane; ++k) {
            float of[norms];
            measure_finite<Rule>(param[k], to_float(grad[k]) * scalars.gradient_factor, state[k], scalars.of_rule, of);
            for (int n = 0; n < norms; ++n) numbers[n][k] = of[n];
        }
    }
    for (int n = 0; n < norms; ++n) {
        float squares[per_lane];
        for (int k = 0; k < per_lane; ++k) squares[k] = numbers[n][k] * numbers[n][k];
        const float sum = sum_of_tile<span>(squares);
        double result = static_cast<double>(sum);
        if (!adds_up(sum)) {
            double exact[per_lane];
            for (int k = 0; k < per_lane; ++k) exact[k] = static_cast<double>(numbers[n][k]) * numbers[n][k];
            result = sum_of_tile<span>(exact);
        }
        if (lane() == 0) row.of_blocks[norms * number + n] = result;
    }
}

template <class Rule, class Coding, class P, class G>
__global__ void __launch_bounds__(threads_per_block, 4) measure_rows(const __grid_constant__ StepBatch<Rule> batch) {
    if (batch.found_inf != nullptr && *batch.found_inf != 0.0f) return;
    each_block(batch, [&](const StepRow<Rule>& row, int64_t block, const StepScalars<Rule>& scalars, int) {
        measure_block<Coding, Rule, P, G>(row, block, scalars);
    });
}

// Rows whose blocks are measured. The sum of a chunk takes the place of that of its first block.
struct SumBatch {
    static constexpr int rows_per_launch = 512;
    int32_t rows;
    const float* found_inf;
    int64_t first[rows_per_launch + 1];  // of each row, its first chunk in the batch
    int64_t blocks[rows_per_launch];
    double* of_blocks[rows_per_launch];
    double* sums[rows_per_launch];
};

// A chunk for each warp.
__global__ void __launch_bounds__(threads_per_block, 4) sum_chunks(const __grid_constant__ SumBatch batch) {
    if (batch.found_inf != nullptr && *batch.found_inf != 0.0f) return;
    const int64_t chunk = warp_of_grid();
    if (chunk >= batch.first[batch.rows]) return;
    const int r = row_of(batch, chunk);
    const int64_t begin = (chunk - batch.first[r]) * chunk_blocks, left = batch.blocks[r] - begin;
    const int64_t count = left < chunk_blocks ? left : chunk_blocks;
    double* of_blocks = batch.of_blocks[r] + norms * begin;
    double sums[norms] = {};
    for (int64_t b = lane(); b < count; b += sum_lanes)
        for (int n = 0; n < norms; ++n) sums[n] += of_blocks[norms * b + n];
    for (double& sum : sums)
        for (int bit = sum_lanes / 2; bit > 0; bit /= 2) sum += __shfl_xor_sync(whole_warp, sum, bit);
    if (lane() == 0)
        for (int n = 0; n < norms; ++n) of_blocks[n] = sums[n];
}

// A row for each thread.
__global__ void __launch_bounds__(threads_per_block, 4) sum_rows(const __grid_constant__ SumBatch batch) {
    const int r = static_cast<int>(blockIdx.x * threads_per_block + threadIdx.x);
    if (r >= batch.rows || (batch.found_inf != nullptr && *batch.found_inf != 0.0f)) return;
    double sums[norms] = {};
    for (int64_t b = 0; b < batch.blocks[r]; b += chunk_blocks)
        for (int n = 0; n < norms; ++n) sums[n] += batch.of_blocks[r][norms * b + n];
    for (int n = 0; n < norms; ++n) batch.sums[r][n] = sums[n];
}

void launch_sums(const Row* rows, int64_t count, const StepInputs& inputs, cudaStream_t stream) {
    static_assert(sum_lanes == warp_size);
    const auto batch = std::make_unique<SumBatch>();
    batch->found_inf = inputs.found_inf;
    for (int64_t i = 0; i < count;) {
        batch->rows = 0;
        for (; i < count && batch->rows < SumBatch::rows_per_launch; ++i) {
            const int r = batch->rows++;
            batch->blocks[r] = blocks_of(rows[i].size, step_block);
            batch->of_blocks[r] = rows[i].of_blocks;
            batch->sums[r] = rows[i].sums;
            batch->first[r + 1] = batch->first[r] + blocks_of(batch->blocks[r], chunk_blocks);
        }
        launch(step_name, sum_chunks, batch->first[batch->rows], stream, *batch);
        launch(step_name, sum_rows, blocks_of(batch->rows, warp_size), stream, *batch);
    }
}

template <class Rule>
Kernel<Rule> kernel_of(const Row& row) {
    const bool wide = row.grad_storage == Storage::Float32;
    return with_coding<Rule>(row, [&](auto coding) {
        using Way = decltype(coding);
        return with_storage(row.param_storage, [&](auto stored) -> Kernel<Rule> {
            using P = typename decltype(stored)::type;
            return wide ? measure_rows<Rule, Way, P, float> : measure_rows<Rule, Way, P, P>;
        });
    });
}

template <class Rule>
void measure_rule(const Row* rows, int64_t count, const StepInputs& inputs, cudaStream_t stream) {
    if constexpr (Rule::has_norms) {
        launch_rows<Rule>(kernel_of<Rule>, nullptr, rows, count, inputs, stream);
        launch_sums(rows, count, inputs, stream);
    }
}

}  // namespace
OPTIM8_END

void optim8::cuda_measure(const Row* rows, int64_t count, const StepInputs& inputs, cudaStream_t stream) {
    StepInputs by = inputs;
    if (count > 0 && rows->scalars != nullptr) by.scalars = nullptr;
    if (by.scalars != nullptr) cuda_count(rows, count, by, stream);
    each_rule(rows, count, by, [&](const Row* of_rule, int64_t many, const StepInputs& with) {
        switch (of_rule->rule) {
#define OPTIM8_MEASURE_CASE(name, type) \
    case RuleId::name: \
        return measure_rule<type>(of_rule, many, with, stream);
            OPTIM8_RULES(OPTIM8_MEASURE_CASE)
#undef OPTIM8_MEASURE_CASE
        }
    });
}
