// A step over rows whose tensors are on the CPU.
#pragma once

#include "core/norms.h"
#include "core/row.h"

#include <functional>
#include <vector>

namespace optim8 {

// Steps all rows, without counting the step. Those of rules with norms are measured here unless they have `sums`.
// `meanwhile`: as for parallel_for.
void step_rows(const std::vector<Row>& rows, int threads, const std::function<void()>& meanwhile = [] {});

// The same for rows that need not be measured, by the calling thread alone and without allocating memory.
void step_rows_here(const std::vector<Row>& rows);

// Blocks [begin, end) of a row, as a row.
Row part_of(const Row& row, int64_t begin, int64_t end);

// Measures rows of rules with norms, in memory that does not grow with them.
class Measurement {
  public:
    explicit Measurement(int threads);
    // The parts of a tensor, rows with the same `sums`, come one after the other. `meanwhile`: as for parallel_for.
    void add(const Row* rows, size_t count, const std::function<void()>& meanwhile = [] {});
    // All is there: every row's `sums` have their values.
    void end();

  private:
    // For each thread: enough that handing out work does not show.
    static constexpr int64_t blocks_at_a_time = 4096, parts_at_a_time = 256;
    int threads_;
    std::vector<Row> parts_;
    std::vector<double> of_blocks_;
    double* sums_ = nullptr;  // of the tensor that `of_tensor_` is of
    BlockSums of_tensor_;
};

}  // namespace optim8
