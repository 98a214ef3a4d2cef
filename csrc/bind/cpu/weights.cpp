// Whole weights from parameters of 16 bits and the low bits beside them, and back.
#include "core/row.h"
#include "cpu/parallel.h"
#include "tensors/arguments.h"

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace optim8 {
namespace {

constexpr int64_t values_at_a_time = 1 << 16;
constexpr uint32_t u_of_nearest24 = 0x80u << 24;  // half of what is below 24 bits

struct WeightArrays {
    void *param, *low;
    float* wide;
    int64_t size;
    Storage storage;
    bool bytes;  // low bits in one byte, not two
};

WeightArrays arrays_of(const char* who, py::handle param, py::handle low, py::handle wide) {
    const Arguments check{who};
    const View p = check.tensor("param", param), l = check.tensor("low", low), w = check.tensor("wide", wide);
    if (!p.has_storage() || p.is_float32()) check.wrong_type("param", "bfloat16 or float16", p);
    if (!l.is_uint8() && !l.is_int16()) check.wrong_type("low", "uint8 or int16", l);
    if (!w.is_float32()) check.wrong_type("wide", "float32", w);
    if (l.size != p.size || w.size != p.size) check.fail("param, low and wide must have the same number of values.");
    return {p.data, l.data, static_cast<float*>(w.data), p.size, p.storage(), l.is_uint8()};
}

template <class Work>
void each_value(const WeightArrays& of, int threads, const Work& work) {
    const auto all = [&](auto* param, auto* low) {
        parallel_for(of.size, values_at_a_time, threads, [&](int64_t begin, int64_t end) {
            for (; begin < end; ++begin) work(param[begin], low[begin], of.wide[begin]);
        });
    };
    const auto with_low = [&](auto* param) {
        of.bytes ? all(param, static_cast<uint8_t*>(of.low)) : all(param, static_cast<int16_t*>(of.low));
    };
    of.storage == Storage::BFloat16 ? with_low(static_cast<bfloat16*>(of.param))
                                    : with_low(static_cast<float16*>(of.param));
}

void put_low(uint32_t weight, uint8_t& low) { low = low_of_weight24(weight); }
void put_low(uint32_t weight, int16_t& low) { low = low_of_weight(weight); }

void join_weights(py::handle param, py::handle low, py::handle wide, int threads) {
    const WeightArrays of = arrays_of("join_weights", param, low, wide);
    const py::gil_scoped_release release;
    each_value(of, threads, [](auto& p, auto& l, float& w) {
        w = weight_value<std::remove_reference_t<decltype(p)>>(join_weight(p.bits, low_of(l)));
    });
}

void part_weights(py::handle param, py::handle low, py::handle wide, int threads) {
    const WeightArrays of = arrays_of("part_weights", param, low, wide);
    const py::gil_scoped_release release;
    each_value(of, threads, [](auto& p, auto& l, float& w) {
        const Weight kind = sizeof l == 1 ? Weight::Bits24 : Weight::Bits32;
        const uint32_t bits = weight_bits<std::remove_reference_t<decltype(p)>>(w);
        const uint32_t weight = keep_weight(kind, bits, u_of_nearest24);
        p.bits = param_of_weight(weight);
        put_low(weight, l);
    });
}

}  // namespace

void bind_weights(py::module_& m) {
    m.def(
        "join_weights", &join_weights, py::arg("param"), py::arg("low"), py::arg("wide"), py::arg("threads"),
        "Fills `wide`, float32, with the weights of bfloat16 or float16 parameters and their low bits, uint8 or int16; "
        "all contiguous, with as many values.");
    m.def("part_weights", &part_weights, py::arg("param"), py::arg("low"), py::arg("wide"), py::arg("threads"),
          "Fills `param` and `low` from `wide`, rounded to the nearest weight of 24 or 32 bits.");
}

}  // namespace optim8
