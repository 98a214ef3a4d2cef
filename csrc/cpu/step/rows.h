// A step over rows whose tensors are on the CPU.
#pragma once

#include "core/row.h"

#include <functional>
#include <vector>

namespace optim8 {

// Steps all rows, without counting the step. Those of rules with norms are measured here unless they have `sums`.
// `meanwhile`: as for parallel_for.
void step_rows(const std::vector<Row>& rows, int threads, const std::function<void()>& meanwhile = [] {});

// The same for rows that need not be measured, by the calling thread alone and without allocating memory.
void step_rows_here(const std::vector<Row>& rows);

// Measures blocks of rows of rules with norms; rows have `of_blocks`, where their sums go.
void measure_rows(const std::vector<Row>& rows, int threads, const std::function<void()>& meanwhile = [] {});

// Adds up `of_blocks` of every row, of which all is measured, and puts it into its `sums`.
void sum_rows(const std::vector<Row>& rows, int threads);

}  // namespace optim8
