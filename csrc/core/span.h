// A range of addresses.
#pragma once

#include <cstdint>
#include <utility>

namespace optim8 {

using Span = std::pair<uintptr_t, uintptr_t>;  // first, one past the last

}  // namespace optim8
