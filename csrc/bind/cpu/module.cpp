// The module optim8._cpu.
#include "bind/codec.h"
#include "bind/jobs.h"
#include "core/code16.h"
#include "cpu/dispatch.h"
#include "cpu/huge_pages.h"
#include "cpu/parallel.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

namespace optim8 {

void bind_step(py::module_& m);
void bind_functional(py::module_& m);
void bind_paging(py::module_& m);
void bind_weights(py::module_& m);

namespace {

// Which code a table is.
CodeKind kind_of(const float* code) {
    const auto equals = [&](const CodeTables& t) { return std::memcmp(code, t.value, sizeof t.value) == 0; };
    if (equals(Tables<Code::Signed>::all)) return CodeKind::Signed;
    if (equals(Tables<Code::Unsigned>::all)) return CodeKind::Unsigned;
    return CodeKind::Any;
}

// The midpoints between the values of a code.
std::vector<float> middle_of(const Arguments& check, const float* code) {
    std::vector<float> middle(code_size - 1);
    for (int i = 0; i + 1 < code_size; ++i) {
        const float low = code[i], high = code[i + 1];
        if (!(low <= high) || !is_finite(low) || !is_finite(high))
            check.fail("code must be finite and sorted from small to large; entries " + std::to_string(i) + " and " +
                       std::to_string(i + 1) + " are not. Sort it.");
        middle[static_cast<size_t>(i)] = midpoint(low, high);
    }
    return middle;
}

void check_blocksize(const Arguments& check, int64_t blocksize) {
    if (blocksize < 1) check.fail("blocksize must be positive, got " + std::to_string(blocksize) + ".");
}

// Blocks handed out at a time.
int64_t chunk_of(int64_t blocks, int64_t blocksize, int threads) {
    return chunk_size(blocks, threads, std::max<int64_t>(1, (1 << 18) / blocksize));
}

void quantize_blockwise(py::handle A, py::handle code, int64_t blocksize, py::handle out, py::handle absmax,
                        int threads, bool keep_positive) {
    const Arguments check{"quantize_blockwise"};
    check_blocksize(check, blocksize);
    QuantizeJob job = quantize_blockwise_job(check, A, code, blocksize, out, absmax);
    job.kind = kind_of(job.code);
    if (keep_positive && job.kind != CodeKind::Unsigned)
        check.fail("keep_positive needs the unsigned dynamic map as code.");
    if (keep_positive) job.kind = CodeKind::Positive;
    std::vector<float> middle;
    if (job.kind == CodeKind::Any) middle = middle_of(check, job.code);
    job.middle = middle.data();
    const int64_t blocks = blocks_of(job.size, blocksize);
    prefer_huge_pages(job.codes, job.size);
    const Kernels& use = kernels();
    const py::gil_scoped_release release;
    parallel_for(blocks, chunk_of(blocks, blocksize, threads), threads,
                 [&](int64_t b, int64_t e) { use.quantize_blocks(job, b, e); });
}

void dequantize_blockwise(py::handle A, py::handle absmax, py::handle code, int64_t blocksize, py::handle out,
                          int threads) {
    const Arguments check{"dequantize_blockwise"};
    check_blocksize(check, blocksize);
    DequantizeJob job = dequantize_blockwise_job(check, A, absmax, code, blocksize, out);
    job.kind = kind_of(job.code);
    const int64_t blocks = blocks_of(job.size, blocksize);
    prefer_huge_pages(job.out, bytes_of(job.size, job.storage));
    const Kernels& use = kernels();
    const py::gil_scoped_release release;
    parallel_for(blocks, chunk_of(blocks, blocksize, threads), threads,
                 [&](int64_t b, int64_t e) { use.dequantize_blocks(job, b, e); });
}

void encode_quotients(py::handle quotients, py::handle out, bool with_sign, int threads) {
    const Arguments check{"encode_quotients"};
    const View values = check.tensor("quotients", quotients);
    if (!values.is_float32()) check.wrong_type("quotients", "float32", values);
    const View codes = check.uint8("out", out, values.size);
    const EncodeJob job{static_cast<const float*>(values.data), static_cast<uint8_t*>(codes.data), values.size,
                        with_sign ? CodeKind::Signed : CodeKind::Unsigned};
    const Kernels& use = kernels();
    const py::gil_scoped_release release;
    parallel_for(blocks_of(values.size, step_block), 256, threads,
                 [&](int64_t b, int64_t e) { use.encode_blocks(job, b, e); });
}

void keep_state(py::handle values, py::handle out, py::handle low, py::handle absmax, bool with_sign, py::handle blocks,
                double step, int state, bool dithered) {
    const Arguments check{"keep_state"};
    const View x = check.tensor("values", values);
    if (!x.is_float32()) check.wrong_type("values", "float32", x);
    const int64_t count = blocks_of(x.size, step_block);
    if (state < 0 || state >= max_states) check.fail("state must be the place of a state in its rule.");
    if (low.is_none() && !dithered) check.fail("state in 8 bits is rounded to nearest by quantize_blockwise.");
    const KeepJob job{static_cast<const float*>(x.data),
                      static_cast<uint8_t*>(check.uint8("out", out, x.size).data),
                      low.is_none() ? nullptr : static_cast<uint8_t*>(check.uint8("low", low, x.size).data),
                      static_cast<float*>(check.float32("absmax", absmax, count).data),
                      static_cast<const int32_t*>(check.sized("blocks", check.int32("blocks", blocks), count).data),
                      x.size,
                      step,
                      state,
                      with_sign,
                      dithered ? Rounding::Dithered : Rounding::Nearest};
    const Kernels& use = kernels();
    const py::gil_scoped_release release;
    parallel_for(count, 256, 1, [&](int64_t b, int64_t e) { use.keep_blocks(job, b, e); });
}

void restore_state(py::handle codes, py::handle low, py::handle absmax, bool with_sign, py::handle out) {
    const Arguments check{"restore_state"};
    const View x = check.tensor("out", out);
    if (!x.is_float32()) check.wrong_type("out", "float32", x);
    const int64_t count = blocks_of(x.size, step_block);
    const RestoreJob job{static_cast<const uint8_t*>(check.uint8("codes", codes, x.size).data),
                         static_cast<const uint8_t*>(check.uint8("low", low, x.size).data),
                         static_cast<const float*>(check.float32("absmax", absmax, count).data),
                         static_cast<float*>(x.data),
                         x.size,
                         with_sign};
    const Kernels& use = kernels();
    const py::gil_scoped_release release;
    parallel_for(count, 256, 1, [&](int64_t b, int64_t e) { use.restore_blocks(job, b, e); });
}

std::vector<std::string> number_operations() {
    return {std::begin(number_operation_names), std::end(number_operation_names)};
}

void apply_number_operation(const std::string& name, py::handle a, py::handle b, py::handle c, py::handle out) {
    const Arguments check{"apply_number_operation"};
    const auto* const known =
        std::find(std::begin(number_operation_names), std::end(number_operation_names), std::string_view(name));
    if (known == std::end(number_operation_names))
        check.fail("name must be one of number_operations, got '" + name + "'.");
    const int64_t size = check.tensor("a", a).size;
    const auto values = [&](const char* argument, py::handle object) {
        return static_cast<float*>(check.float32(argument, object, size).data);
    };
    const NumberJob job{static_cast<NumberOperation>(known - std::begin(number_operation_names)),
                        values("a", a),
                        values("b", b),
                        values("c", c),
                        values("out", out),
                        size};
    const Kernels& use = kernels();
    const py::gil_scoped_release release;
    parallel_for(blocks_of(size, step_block), 256, 1,
                 [&](int64_t begin, int64_t end) { use.number_blocks(job, begin, end); });
}

py::dict isa_info() {
    py::dict info;
    info["compiled"] = compiled_isas();
    info["available"] = available_isas();
    info["used"] = kernels().isa;
    return info;
}

}  // namespace
}  // namespace optim8

PYBIND11_MODULE(_cpu, m) {
    using namespace optim8;
    m.doc() = "CPU kernels of optim8. Internal: use optim8 and optim8.functional.";
    m.attr("version") = OPTIM8_VERSION;
    bind_codec(m);
    kernels();  // an OPTIM8_CPU_ISA that cannot be had is an error now, not at the first step
    m.def("isa_info", &isa_info, "Instruction sets: compiled, available on this machine, used.");
    m.def("quantize_blockwise", &quantize_blockwise, py::arg("A"), py::arg("code"), py::arg("blocksize"),
          py::arg("out"), py::arg("absmax"), py::arg("threads"), py::arg("keep_positive") = false);
    m.def("dequantize_blockwise", &dequantize_blockwise, py::arg("A"), py::arg("absmax"), py::arg("code"),
          py::arg("blocksize"), py::arg("out"), py::arg("threads"));
    m.def("encode_quotients", &encode_quotients, py::arg("quotients"), py::arg("out"), py::arg("signed"),
          py::arg("threads"), "Codes of float32 quotients in [-1, 1], for checking the codec.");
    m.def("keep_state", &keep_state, py::arg("values"), py::arg("out"), py::arg("low"), py::arg("absmax"),
          py::arg("signed"), py::arg("blocks"), py::arg("step"), py::arg("state"), py::arg("dithered"),
          "What a step stores for finite values of a state, with dithered rounding or in 16 bits: codes, low bytes (or "
          "None), and absmax by 256 values. blocks: int32, the numbers of these blocks in their parameter; state: its "
          "place in the rule.");
    m.def("restore_state", &restore_state, py::arg("codes"), py::arg("low"), py::arg("absmax"), py::arg("signed"),
          py::arg("out"), "The float32 values of state in 16 bits.");
    m.attr("middle_low") = middle_low;
    m.attr("number_operations") = number_operations();
    m.def("apply_number_operation", &apply_number_operation, py::arg("name"), py::arg("a"), py::arg("b"), py::arg("c"),
          py::arg("out"), "An operation of rules over float32 arrays, for checking that every instruction set agrees.");
    bind_step(m);
    bind_functional(m);
    bind_paging(m);
    bind_weights(m);
}
