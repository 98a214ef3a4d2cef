// The native half of optim8.functional beyond blockwise codes.
#include "bind/view.h"

namespace optim8 {

void bind_functional(py::module_& m) { (void)m; }

}  // namespace optim8
