// The step of much work, with 8-bit state and dithered rounding: one block of threads stays on each multiprocessor,
// with its tables in shared memory; a warp loads its next block of values before it encodes the one before. Names no
// rule.
//
// The bits are those of step_rows. What a block of values has that is rare is seen from its largest numbers; such a
// block is marked, and stepped as in step_rows when all others are done.
#pragma once

#include "cuda/bounded.h"
#include "cuda/columns.h"
#include "cuda/step_rows.h"

OPTIM8_BEGIN

// Elsewhere there is less shared memory, or ptxas runs out of registers; the kernel then leaves all blocks over.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
constexpr bool steps_ahead = false;
#else
constexpr bool steps_ahead = true;
#endif
constexpr int least_major = 9, major_beyond = 12;  // of the compute capability

constexpr int warps_of_columns = 16;
constexpr int threads_of_columns = warps_of_columns * warp_size;

template <class Rule, class P, class G>
struct LaneBlock {
    LaneWords<P> param;
    LaneWords<G> grad;
    uint32_t codes[state_count<Rule>][per_lane / 4];
    float absmax[state_count<Rule>];
};

// Where they lie, and those of the blocks behind.
template <class Rule, class P, class G>
struct LanePlace {
    P* param;
    const G* grad;
    uint8_t* codes[state_count<Rule>];
    float* absmax[state_count<Rule>];

    OPTIM8_DEVICE LanePlace(const StepRow<Rule>& row, int64_t block) {
        const int64_t at = block * step_block + place<packet_span<P>>(0);
        param = static_cast<P*>(row.param) + at;
        grad = static_cast<const G*>(row.grad) + at;
        for (int s = 0; s < state_count<Rule>; ++s) {
            codes[s] = static_cast<uint8_t*>(row.state[s]) + at;
            absmax[s] = row.absmax[s] + block;
        }
    }
    OPTIM8_DEVICE void move(int blocks) {
        param += blocks * step_block;
        grad += blocks * step_block;
        for (int s = 0; s < state_count<Rule>; ++s) {
            codes[s] += blocks * step_block;
            absmax[s] += blocks;
        }
    }
};

template <int by, class Rule, class P, class G>
OPTIM8_DEVICE void load_block(const LanePlace<Rule, P, G>& at, LaneBlock<Rule, P, G>& to) {
    constexpr int span = packet_span<P>;
    load_words<span>(at.param + by * step_block, to.param.word);
    load_words<span>(at.grad + by * step_block, to.grad.word);
    each_state<Rule>([&](auto s) {
        load_words<span>(at.codes[s.index] + by * step_block, to.codes[s.index]);
        to.absmax[s.index] = at.absmax[s.index][by];
    });
}

// A largest magnitude from which on reciprocals are far from infinity. Blocks with less are scaled first.
constexpr float small_block = 0x1p-100f;

// Steps the block `by` blocks behind `at`, which is loaded, and where there are more loads the warp's next. `number`:
// as in Block.
template <class Coding, bool scaled_grad, int by, class Rule, class P, class G>
OPTIM8_DEVICE void step_loaded(const LanePlace<Rule, P, G>& at, LaneBlock<Rule, P, G>& loaded, bool more,
                               uint32_t number, const StepScalars<Rule>& scalars, const LaneColumns& columns) {
    constexpr int span = packet_span<P>;
    P param[per_lane];
    float now[state_count<Rule>][per_lane];
    Largest so_far[state_count<Rule>];
    Bounds bounds;
#pragma unroll
    for (int k = 0; k < per_lane; ++k) {
        Bounded p(loaded.param[k], &bounds), state[state_count<Rule>];
        each_state<Rule>([&](auto s) {
            const float value =
                decode_column<code_of<Rule, s.index>>(loaded.codes[s.index], k, columns) * loaded.absmax[s.index];
            state[s.index] = Bounded(restore<Coding::template root<Rule, s.index>>(value), &bounds);
        });
        const float grad = loaded.grad[k];
        Rule::update(p, Bounded(scaled_grad ? grad * scalars.gradient_factor : grad, &bounds), state, scalars.of_rule);
        param[k] = from_float<P>(plain(p));
        each_state<Rule>([&](auto s) {
            float& x = now[s.index][k];
            x = plain(state[s.index]);
            if constexpr (Coding::template root<Rule, s.index>) {
                x = scaled_root(x);
                so_far[s.index].add(x);
            } else if (k % 2 == 1) {
                so_far[s.index].add(float_of(larger_magnitude(bits_of(fabsf(now[s.index][k - 1])), x)));
            }
        });
    }
    float largest[state_count<Rule>];
    bool good = true;
    each_state<Rule>([&](auto s) {
        constexpr uint32_t limit = Coding::template root<Rule, s.index> ? most_scaled_root : 0x7e800000u;  // 2^126
        const uint32_t of_lane = s.index == 0 && !bounds.hold() ? inf_bits : so_far[s.index].bits();
        const uint32_t of_warp = largest_of_warp(of_lane);
        good = good && of_warp < limit;
        largest[s.index] = float_of(of_warp);
    });
    LaneBlock<Rule, P, G> next;
    if (more) load_block<by + warps_of_columns>(at, next);
    loaded = next;
    if (!good) return set_mark(number + get_word(WarpWord::FirstMark));

    store_packets<span>(at.param + by * step_block, param);
    float reciprocal[state_count<Rule>];
    each_state<Rule>([&](auto s) {
        constexpr bool root = Coding::template root<Rule, s.index>;
        constexpr Code code = code_of<Rule, s.index>;
        float of = largest[s.index];
        // dither_absmax of what is not too large for it.
        if (lane() == 0) at.absmax[s.index][by] = of * (DitherTablesOf<code>::all.absmax * (root ? 0x1p-32f : 1.0f));
        // The same quotients; those of 0 are 0 whatever the reciprocal. Roots are far from small; where all are 0 their
        // quotients are NaN, which is taken to be the lowest, and code 0 is that of x.
        if (!root && of < small_block) {
            of = maximum(of, 0x1p-149f) * dither_scale;
            for (float& x : now[s.index]) x *= dither_scale;
        }
        reciprocal[s.index] = dither_reciprocal<code, Quick>(of, quotient_scale);
    });
    const uint32_t start = lane_dither_start<span>(number, scalars.dither_time);
    uint32_t codes[state_count<Rule>][per_lane];
#pragma unroll
    for (int k = 0; k < per_lane; k += 2) {
        each_state<Rule>([&](auto s) {
            constexpr Code code = code_of<Rule, s.index>;
            const float (&x)[per_lane] = now[s.index];
            float y[2];
            uint32_t u[2];
            for (int i = 0; i < 2; ++i) {
                y[i] = (is_signed(code) ? fabsf(x[k + i]) : x[k + i]) * reciprocal[s.index];
                u[i] = lane_dither<s.index, span>(start, k + i);
            }
            encode_columns<code>(y, u, columns, codes[s.index] + k);
            if constexpr (!is_signed(code))
                for (int i = k; i < k + 2; ++i)
                    codes[s.index][i] = with_sign<code, Coding::template root<Rule, s.index>>(codes[s.index][i], x[i]);
        });
    }
    each_state<Rule>([&](auto s) {
        uint32_t words[per_lane / 4];
        if constexpr (is_signed(code_of<Rule, s.index>))
            pack_signed(codes[s.index], now[s.index], words);
        else
            pack_bytes<2>(codes[s.index], words);
        store_bytes<span>(at.codes[s.index] + by * step_block - place<span>(0), words);
    });
}

// `count` of the warp's blocks from `block` on, which are a turn of warps apart. `mark`: of the first.
template <class Coding, bool scaled_grad, class P, class G, class Rule>
OPTIM8_DEVICE void step_ahead(const StepRow<Rule>& row, int block, int count, uint32_t mark,
                              const StepScalars<Rule>& scalars) {
    constexpr int turn = warps_of_columns;
    const LaneColumns columns;
    LanePlace<Rule, P, G> at(row, block);
    uint32_t number = row.first_block + static_cast<uint32_t>(block);
    set_word(WarpWord::FirstMark, mark - number);
    LaneBlock<Rule, P, G> loaded;
    load_block<0>(at, loaded);
    for (int left = count - 1;; left -= 2) {
        step_loaded<Coding, scaled_grad, 0>(at, loaded, left > 0, number, scalars, columns);
        if (left <= 0) break;
        step_loaded<Coding, scaled_grad, turn>(at, loaded, left > 1, number + turn, scalars, columns);
        if (left <= 1) break;
        at.move(2 * turn);
        number += 2 * turn;
    }
}

// visit(row, scalars, block, end, mark) for each row that the block of threads has a part of: the warp's first block of
// the row, where the part ends, and the first one's mark. The warps take the blocks of a part in turn.
template <class Rule, class Visit>
OPTIM8_DEVICE void each_part(const StepBatch<Rule>& batch, const Visit& visit) {
    const int warp = static_cast<int>(threadIdx.x) / warp_size;
    set_word(WarpWord::Row, static_cast<uint32_t>(row_of(batch, share_begin())));
    for (;;) {
        const int r = static_cast<int>(get_word(WarpWord::Row)), begin = share_begin(), end = share_end();
        if (r >= batch.rows || batch.first[r] >= end) return;
        set_word(WarpWord::Row, static_cast<uint32_t>(r + 1));
        const int first = static_cast<int>(batch.first[r]);
        const int from = begin > first ? begin : first;
        const int block = from + ((warp - from) & (warps_of_columns - 1));
        const int last = minimum(end, static_cast<int>(batch.first[r + 1]));
        const StepRow<Rule>& row = batch.row[r];
        visit(row, scalars_of(batch, row), block - first, last - first, static_cast<uint32_t>(block - begin));
    }
}

// Those of the row's blocks that step_ahead may take: the first of them.
template <class Rule>
OPTIM8_DEVICE int blocks_ahead(const StepRow<Rule>& row, const StepScalars<Rule>& scalars) {
    return steps_ahead && row.fits_columns() && bounds_serve<Rule>(scalars.of_rule)
               ? static_cast<int>(row.size / step_block)
               : 0;
}

template <class Rule, class Coding, class P, class G, bool scaled_grad>
__global__ void __launch_bounds__(threads_of_columns, 1) step_columns(const __grid_constant__ StepBatch<Rule> batch) {
    if (batch.found_inf != nullptr && *batch.found_inf != 0.0f) return;
    const uint32_t blocks = static_cast<uint32_t>(batch.first[batch.rows]);
    fill_columns<threads_of_columns>(blocks / gridDim.x, blocks % gridDim.x);
    constexpr int turn = warps_of_columns;
    each_part(batch,
              [&](const StepRow<Rule>& row, const StepScalars<Rule>& scalars, int block, int end, uint32_t mark) {
                  end = minimum(end, blocks_ahead(row, scalars));
                  const int count = (end - block + turn - 1) / turn;
                  if constexpr (steps_ahead)
                      if (count > 0) step_ahead<Coding, scaled_grad, P, G>(row, block, count, mark, scalars);
              });
    each_part(batch,
              [&](const StepRow<Rule>& row, const StepScalars<Rule>& scalars, int block, int end, uint32_t mark) {
                  const int ahead = blocks_ahead(row, scalars);
#pragma unroll 1
                  for (; block < end; block += turn, mark += turn) {
                      if (block < ahead && !is_marked(mark)) continue;
                      const Block<Rule, P, G> at(row, block);
                      if (!step_usual(row, at, scalars, LaneStates<Rule, Coding>{}))
                          step_unusual<Coding>(row, at, block, scalars);
                  }
              });
}

// Blocks of values for each warp, from which on it is worth to fill the tables.
constexpr int64_t blocks_worth_columns = 8;

template <class Rule>
Kernel<Rule> columns_kernel(const Row& row, bool scaled_grad) {
    using Way = Coding<Rounding::Dithered, true>;
    return with_storage(row.param_storage, [&](auto stored) -> Kernel<Rule> {
        using P = typename decltype(stored)::type;
        const bool wide = row.grad_storage == Storage::Float32;
        if (scaled_grad) return wide ? step_columns<Rule, Way, P, float, true> : step_columns<Rule, Way, P, P, true>;
        return wide ? step_columns<Rule, Way, P, float, false> : step_columns<Rule, Way, P, P, false>;
    });
}

// Batcher's LaunchMany: where there is much work, the state has 8 bits, and the device has so much shared memory.
template <class Rule>
bool launch_columns(const StepBatch<Rule>& batch, const Row& row, cudaStream_t stream) {
    const int64_t blocks = batch.first[batch.rows];
    if (row.precision == Precision::Bits16 || row.rounding != Rounding::Dithered || row.direct) return false;
    const int major = device_attribute(cudaDevAttrComputeCapabilityMajor);
    if (major < least_major || major >= major_beyond) return false;
    const int64_t multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
    if (blocks == 0 || blocks > multiprocessors * most_marks || blocks > INT32_MAX) return false;
    // Where the device derives the scalars, the host does not know the factor.
    bool scaled_grad = batch.device_scalars != nullptr;
    int64_t usual = 0;
    for (int r = 0; r < batch.rows; ++r) {
        if (batch.row[r].fits_columns()) usual += batch.first[r + 1] - batch.first[r];
        if (batch.device_scalars == nullptr)
            scaled_grad = scaled_grad || batch.scalars[batch.row[r].scalars].gradient_factor != 1.0f;
    }
    if (usual < multiprocessors * warps_of_columns * blocks_worth_columns || usual < blocks / 8 * 7) return false;
    const Kernel<Rule> kernel = columns_kernel<Rule>(row, scaled_grad);
    if (!allow_shared(kernel, columns_bytes)) return false;
    launch_blocks(step_name, kernel, multiprocessors, threads_of_columns, columns_bytes, stream, batch);
    return true;
}

OPTIM8_END
