// A step over rows whose tensors are on the CPU.
#pragma once

#include "core/row.h"

#include <functional>
#include <vector>

namespace optim8 {

// Steps all rows, without counting the step. `meanwhile`: as for parallel_for.
void step_rows(const std::vector<Row>& rows, int threads, const std::function<void()>& meanwhile = [] {});

// The same by the calling thread alone, and without allocating memory.
void step_rows_here(const std::vector<Row>& rows);

}  // namespace optim8
