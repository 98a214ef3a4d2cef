// The module optim8._cpu.
#include "core/codec.h"
#include "cpu/dispatch.h"
#include "cpu/huge_pages.h"
#include "cpu/parallel.h"
#include "tensors/view.h"

#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <vector>

namespace optim8 {

void bind_step(py::module_& m);
void bind_functional(py::module_& m);
void bind_paging(py::module_& m);

namespace {

[[noreturn]] void fail(const std::string& message) { throw py::value_error(message); }

// A contiguous CPU tensor, or an error that says what came.
View contiguous_cpu(const char* who, const char* argument, py::handle object) {
    View view = require_view(who, argument, object);
    if (!view.on_cpu() || !view.contiguous())
        fail(std::string(who) + ": " + argument + " must be contiguous and on cpu, got " + view.describe() + ".");
    return view;
}

void check_size(const char* who, const char* argument, const View& view, int64_t needed) {
    if (view.size != needed)
        fail(std::string(who) + ": " + argument + " must have " + std::to_string(needed) + " entries, got " +
             std::to_string(view.size) + ".");
}

struct Table {
    const float* values;
    std::vector<float> middle;
    CodeKind kind;
};

Table read_code(const char* who, py::handle object, bool for_encoding) {
    const View code = contiguous_cpu(who, "code", object);
    if (!code.is_float32() || code.size != code_size)
        fail(std::string(who) + ": code must be 256 float32 values, got " + code.describe() + ".");
    Table table{static_cast<const float*>(code.data), {}, CodeKind::Any};
    const auto equals = [&](const CodeTables& t) { return std::memcmp(table.values, t.value, sizeof t.value) == 0; };
    if (equals(Tables<Code::Signed>::all)) table.kind = CodeKind::Signed;
    if (equals(Tables<Code::Unsigned>::all)) table.kind = CodeKind::Unsigned;
    if (table.kind != CodeKind::Any || !for_encoding) return table;
    table.middle.resize(code_size - 1);
    for (int i = 0; i + 1 < code_size; ++i) {
        const float low = table.values[i], high = table.values[i + 1];
        if (!(low <= high) || !is_finite(low) || !is_finite(high))
            fail(std::string(who) + ": code must be finite and sorted from small to large; entries " +
                 std::to_string(i) + " and " + std::to_string(i + 1) + " are not. Sort it.");
        table.middle[i] = midpoint(low, high);
    }
    return table;
}

void check_blocksize(const char* who, int64_t blocksize) {
    if (blocksize < 1) fail(std::string(who) + ": blocksize must be positive, got " + std::to_string(blocksize) + ".");
}

// Blocks handed out at a time.
int64_t chunk_of(int64_t blocks, int64_t blocksize, int threads) {
    return chunk_size(blocks, threads, std::max<int64_t>(1, (1 << 18) / blocksize));
}

void quantize_blockwise(py::handle A, py::handle code, int64_t blocksize, py::handle out, py::handle absmax,
                        int threads, bool keep_positive) {
    constexpr const char* who = "quantize_blockwise";
    check_blocksize(who, blocksize);
    const View values = contiguous_cpu(who, "A", A);
    if (!values.has_storage())
        fail(std::string(who) + ": A must be float32, bfloat16 or float16, got " + values.describe() + ".");
    Table table = read_code(who, code, true);
    if (keep_positive) {
        if (table.kind != CodeKind::Unsigned)
            fail(std::string(who) + ": keep_positive needs the unsigned dynamic map as code.");
        table.kind = CodeKind::Positive;
    }
    const View codes = contiguous_cpu(who, "out", out);
    if (!codes.is_uint8()) fail(std::string(who) + ": out must be uint8, got " + codes.describe() + ".");
    check_size(who, "out", codes, values.size);
    const View scales = contiguous_cpu(who, "absmax", absmax);
    if (!scales.is_float32()) fail(std::string(who) + ": absmax must be float32, got " + scales.describe() + ".");
    const int64_t blocks = blocks_of(values.size, blocksize);
    check_size(who, "absmax", scales, blocks);
    const QuantizeJob job{values.data,
                          static_cast<uint8_t*>(codes.data),
                          static_cast<float*>(scales.data),
                          table.values,
                          table.middle.data(),
                          values.size,
                          blocksize,
                          values.storage(),
                          table.kind};
    prefer_huge_pages(codes.data, codes.bytes());
    const Kernels& use = kernels();
    const py::gil_scoped_release release;
    parallel_for(blocks, chunk_of(blocks, blocksize, threads), threads,
                 [&](int64_t b, int64_t e) { use.quantize_blocks(job, b, e); });
}

void dequantize_blockwise(py::handle A, py::handle absmax, py::handle code, int64_t blocksize, py::handle out,
                          int threads) {
    constexpr const char* who = "dequantize_blockwise";
    check_blocksize(who, blocksize);
    const View codes = contiguous_cpu(who, "A", A);
    if (!codes.is_uint8()) fail(std::string(who) + ": A must be uint8, got " + codes.describe() + ".");
    const View scales = contiguous_cpu(who, "absmax", absmax);
    if (!scales.is_float32()) fail(std::string(who) + ": absmax must be float32, got " + scales.describe() + ".");
    const int64_t blocks = blocks_of(codes.size, blocksize);
    check_size(who, "absmax", scales, blocks);
    const Table table = read_code(who, code, false);
    const View values = contiguous_cpu(who, "out", out);
    if (!values.has_storage())
        fail(std::string(who) + ": out must be float32, bfloat16 or float16, got " + values.describe() + ".");
    check_size(who, "out", values, codes.size);
    const DequantizeJob job{static_cast<const uint8_t*>(codes.data),
                            static_cast<const float*>(scales.data),
                            table.values,
                            values.data,
                            codes.size,
                            blocksize,
                            values.storage(),
                            table.kind};
    prefer_huge_pages(values.data, values.bytes());
    const Kernels& use = kernels();
    const py::gil_scoped_release release;
    parallel_for(blocks, chunk_of(blocks, blocksize, threads), threads,
                 [&](int64_t b, int64_t e) { use.dequantize_blocks(job, b, e); });
}

void encode_quotients(py::handle quotients, py::handle out, bool with_sign, int threads) {
    constexpr const char* who = "encode_quotients";
    const View values = contiguous_cpu(who, "quotients", quotients);
    if (!values.is_float32()) fail(std::string(who) + ": quotients must be float32, got " + values.describe() + ".");
    const View codes = contiguous_cpu(who, "out", out);
    if (!codes.is_uint8()) fail(std::string(who) + ": out must be uint8, got " + codes.describe() + ".");
    check_size(who, "out", codes, values.size);
    const EncodeJob job{static_cast<const float*>(values.data), static_cast<uint8_t*>(codes.data), values.size,
                        with_sign ? CodeKind::Signed : CodeKind::Unsigned};
    const Kernels& use = kernels();
    const py::gil_scoped_release release;
    parallel_for(blocks_of(values.size, step_block), 256, threads,
                 [&](int64_t b, int64_t e) { use.encode_blocks(job, b, e); });
}

std::vector<float> dynamic_map(bool with_sign) {
    const CodeTables& t = with_sign ? Tables<Code::Signed>::all : Tables<Code::Unsigned>::all;
    return std::vector<float>(t.value, t.value + code_size);
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
    m.attr("step_block") = step_block;
    kernels();  // an OPTIM8_CPU_ISA that cannot be had is an error now, not at the first step
    m.def("isa_info", &isa_info, "Instruction sets: compiled, available on this machine, used.");
    m.def("dynamic_map", &dynamic_map, py::arg("signed"), "The 256 values of the dynamic code.");
    m.def("quantize_blockwise", &quantize_blockwise, py::arg("A"), py::arg("code"), py::arg("blocksize"),
          py::arg("out"), py::arg("absmax"), py::arg("threads"), py::arg("keep_positive") = false);
    m.def("dequantize_blockwise", &dequantize_blockwise, py::arg("A"), py::arg("absmax"), py::arg("code"),
          py::arg("blocksize"), py::arg("out"), py::arg("threads"));
    m.def("encode_quotients", &encode_quotients, py::arg("quotients"), py::arg("out"), py::arg("signed"),
          py::arg("threads"), "Codes of float32 quotients in [-1, 1], for checking the codec.");
    bind_step(m);
    bind_functional(m);
    bind_paging(m);
}
