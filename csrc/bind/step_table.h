// All tensors of one step, gathered and checked before anything is changed.
#pragma once

#include "bind/view.h"

#include <pybind11/stl.h>

#include <vector>

namespace optim8 {

// What a step needs from Python before a row can be made.
struct Wanted {
    std::vector<int64_t> state;   // indices of parameters that have a gradient but no state yet
    std::vector<int64_t> layout;  // indices of parameters whose gradient has other strides than they have
};

class StepTable {
  public:
    // Gathers one parameter group. `params` is a list of tensors, `state` the optimizer's state dict, `relaid` maps
    // indices to gradients copied into the parameter's layout. Throws ValueError that names `owner`, group and index.
    Wanted add(py::list params, py::dict state, RuleId rule, const Hyper& hyper, const std::string& owner,
               int64_t group, py::dict relaid);

    // Steps every row on the CPU and counts the step. Needs all rows on the CPU.
    void run_cpu(int threads);

    const std::vector<Row>& rows() const { return rows_; }
    // The parameters of the rows, in order.
    const py::list& params() const { return params_; }

  private:
    std::vector<Row> rows_;
    std::vector<float*> steps_;  // where each row's step is counted
    std::vector<float> next_steps_;
    py::list params_;
};

}  // namespace optim8
