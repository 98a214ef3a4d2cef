#pragma once

#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

namespace optim8 {

namespace py = pybind11;

// DLPack capsules of tensors in the memory of `flat`, contiguous. Each begins at an element of it, and keeps it alive.
// Throws ValueError where one does not lie within it.
py::list cut(py::handle flat, const std::vector<int64_t>& begins, const std::vector<std::vector<int64_t>>& shapes,
             const std::vector<std::vector<int64_t>>& strides);

}  // namespace optim8
