// What every compiled module tells Python of the dynamic code.
#pragma once

#include "core/codec.h"
#include "tensors/arguments.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

namespace optim8 {

// The dynamic code, also with other numbers of bits. As in core/codec.h, it consists of decades of 10, each split
// evenly into twice as many cells as the one below. Bits that the exponent does not need refine the top decade by a
// grid of its own.
inline std::vector<float> dynamic_map(bool with_sign, int max_exponent_bits, int total_bits) {
    const Arguments check{"create_dynamic_map"};
    if (total_bits < 2 || total_bits > 8 || max_exponent_bits < 1 || max_exponent_bits >= total_bits)
        check.fail("needs 2 <= total_bits <= 8 and 1 <= max_exponent_bits < total_bits, got total_bits=" +
                   std::to_string(total_bits) + ", max_exponent_bits=" + std::to_string(max_exponent_bits) + ".");
    const int first = 1 << (total_bits - max_exponent_bits - (with_sign ? 1 : 0));
    std::vector<float> map = {0.0f, 1.0f};
    const auto add_grid = [&](int cells, float scale) {
        for (int j = 0; j < cells; ++j) {
            const float value = scale * cell_centre(j, cells);
            map.push_back(value);
            if (with_sign) map.push_back(-value);
        }
    };
    for (int i = 0; i < max_exponent_bits; ++i)
        add_grid(first << i, static_cast<float>(decade_scale[decades - max_exponent_bits + i]));
    add_grid(first - (with_sign ? 1 : 2), static_cast<float>(decade_scale[decades - 1]));
    map.resize(code_size, 0.0f);
    std::sort(map.begin(), map.end());
    return map;
}

inline void bind_codec(py::module_& m) {
    m.attr("step_block") = step_block;
    m.def("dynamic_map", &dynamic_map, py::arg("signed"), py::arg("max_exponent_bits") = decades,
          py::arg("total_bits") = 8, "The 256 values of the dynamic code, padded with zeros where it has fewer.");
    m.def(
        "zero_code",
        [](bool with_sign) { return static_cast<int>(zero_code_of(with_sign ? Code::Signed : Code::Unsigned)); },
        py::arg("signed"), "The dynamic code of 0.");
}

}  // namespace optim8
