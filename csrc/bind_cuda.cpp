// The module optim8._cuda: the functions of optim8._cpu for tensors on CUDA devices, and the step over gathered rows.
// Work goes to torch's current stream of the tensors' device; nothing here waits for it.
#include "bind/arguments.h"
#include "core/codec.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"

#include <pybind11/stl.h>

#include <string>
#include <vector>

// The tests run this module on memory of the CPU, over a shim of CUDA.
#if !defined(OPTIM8_DEVICE_TYPE)
#define OPTIM8_DEVICE_TYPE dlpack::cuda
#endif

namespace optim8 {
namespace {

constexpr int32_t device_type = OPTIM8_DEVICE_TYPE;

// A device made current for the time of a call, and torch's stream there.
class Device {
  public:
    Device(const char* who, int index) {
        check_cuda(who, cudaGetDevice(&before_));
        now_ = index < 0 ? before_ : index;
        if (now_ != before_) check_cuda(who, cudaSetDevice(now_));
        if (device_type != dlpack::cuda) return;
        const auto torch_stream = py::module_::import("torch").attr("cuda").attr("current_stream")(now_);
        stream = reinterpret_cast<cudaStream_t>(torch_stream.attr("cuda_stream").cast<uintptr_t>());
    }
    ~Device() {
        if (now_ != before_) cudaSetDevice(before_);
    }
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;

    cudaStream_t stream = nullptr;

  private:
    int before_ = 0, now_ = 0;
};

// Device memory of torch's allocator, beside `near`. Kernels on the stream may use it when the object is gone.
py::object float_scratch(py::handle near, int64_t size) { return near.attr("new_empty")(size); }

Fourbit read_type(const Arguments& check, const std::string& quant_type) {
    if (quant_type == "nf4") return Fourbit::NF4;
    if (quant_type == "fp4") return Fourbit::FP4;
    check.fail("quant_type must be 'nf4' or 'fp4', got '" + quant_type + "'.");
}

int64_t halves(int64_t size) { return size / 2 + size % 2; }

void check_blocksize(const Arguments& check, int64_t blocksize) {
    if (blocksize < 1 || blocksize > 1 << 30)
        check.fail("blocksize must be from 1 to 2^30, got " + std::to_string(blocksize) + ".");
}

void quantize_blockwise(py::handle A, py::handle code, int64_t blocksize, py::handle out, py::handle absmax, int,
                        bool keep_positive) {
    const Arguments check{"quantize_blockwise", device_type};
    check_blocksize(check, blocksize);
    const View values = check.floats("A", A);
    const View table = check.float32("code", code, code_size);
    const View codes = check.uint8("out", out, values.size);
    const View scales = check.float32("absmax", absmax, blocks_of(values.size, blocksize));
    const py::object info = float_scratch(code, code_info_size);
    const QuantizeJob job{values.data,
                          static_cast<uint8_t*>(codes.data),
                          static_cast<float*>(scales.data),
                          static_cast<const float*>(table.data),
                          nullptr,
                          values.size,
                          blocksize,
                          values.storage(),
                          keep_positive ? CodeKind::Positive : CodeKind::Any};
    const Device device(check.who, check.device);
    cuda_quantize(job, static_cast<float*>(check.float32("scratch", info, code_info_size).data), device.stream);
}

void dequantize_blockwise(py::handle A, py::handle absmax, py::handle code, int64_t blocksize, py::handle out, int) {
    const Arguments check{"dequantize_blockwise", device_type};
    check_blocksize(check, blocksize);
    const View values = check.floats("out", out);
    const View codes = check.uint8("A", A, values.size);
    const View scales = check.float32("absmax", absmax, blocks_of(values.size, blocksize));
    const View table = check.float32("code", code, code_size);
    const DequantizeJob job{static_cast<const uint8_t*>(codes.data),
                            static_cast<const float*>(scales.data),
                            static_cast<const float*>(table.data),
                            values.data,
                            values.size,
                            blocksize,
                            values.storage(),
                            CodeKind::Any};
    const Device device(check.who, check.device);
    cuda_dequantize(job, device.stream);
}

void quantize_4bit(py::handle A, const std::string& quant_type, int64_t blocksize, py::handle out, py::handle absmax,
                   int) {
    const Arguments check{"quantize_4bit", device_type};
    const Fourbit type = read_type(check, quant_type);
    check.blocksize(blocksize, 32);
    const View values = check.floats("A", A);
    const View packed = check.uint8("out", out, halves(values.size));
    const View scales = check.float32("absmax", absmax, blocks_of(values.size, blocksize));
    const Quantize4Job job{values.data,
                           static_cast<uint8_t*>(packed.data),
                           static_cast<float*>(scales.data),
                           values.size,
                           blocksize,
                           values.storage(),
                           type};
    const Device device(check.who, check.device);
    cuda_quantize_4bit(job, device.stream);
}

void dequantize_4bit(py::handle A, py::handle absmax, const std::string& quant_type, int64_t blocksize, py::handle out,
                     int) {
    const Arguments check{"dequantize_4bit", device_type};
    const Fourbit type = read_type(check, quant_type);
    check.blocksize(blocksize, 32);
    const View values = check.floats("out", out);
    const View packed = check.uint8("A", A, halves(values.size));
    const View scales = check.float32("absmax", absmax, blocks_of(values.size, blocksize));
    const Dequantize4Job job{static_cast<const uint8_t*>(packed.data),
                             static_cast<const float*>(scales.data),
                             nullptr,
                             values.data,
                             values.size,
                             blocksize,
                             values.storage()};
    const Device device(check.who, check.device);
    cuda_dequantize_4bit(job, type, device.stream);
}

void gemv_4bit(py::handle A, py::handle B, py::handle absmax, py::handle code, int64_t blocksize, py::handle out, int) {
    const Arguments check{"gemv_4bit", device_type};
    check.blocksize(blocksize, 32);
    const View vector = check.floats("A", A);
    const View result = check.floats("out", out);
    int64_t weights = 0;
    if (__builtin_mul_overflow(vector.size, result.size, &weights)) check.fail("the weight has too many values.");
    const View packed = check.uint8("B", B, halves(weights));
    const View scales = check.float32("absmax", absmax, blocks_of(weights, blocksize));
    const View table = check.float32("code", code, fourbit_size);
    const CudaGemv4Job job{vector.data,
                           static_cast<const uint8_t*>(packed.data),
                           static_cast<const float*>(scales.data),
                           static_cast<const float*>(table.data),
                           result.data,
                           result.size,
                           vector.size,
                           blocksize,
                           vector.storage(),
                           result.storage()};
    const Device device(check.who, check.device);
    cuda_gemv_4bit(job, device.stream);
}

void int8_vectorwise_quant(py::handle A, float threshold, py::handle out, py::handle stats, py::handle outliers, int) {
    const Arguments check{"int8_vectorwise_quant", device_type};
    const View values = check.floats("A", A);
    const Rows shape(values);
    const View codes = check.sized("out", check.int8("out", out), values.size);
    const View scales = check.float32("stats", stats, shape.rows);
    if (!outliers.is_none() && !(threshold > 0.0f)) check.fail("threshold must be positive with outliers.");
    const float limit = outliers.is_none() ? float_of(inf_bits) : threshold;
    Int8QuantizeJob job{values.data,
                        static_cast<int8_t*>(codes.data),
                        static_cast<float*>(scales.data),
                        nullptr,
                        shape.rows,
                        shape.columns,
                        limit,
                        values.storage()};
    if (!outliers.is_none())
        job.outliers = static_cast<uint8_t*>(check.uint8("outliers", outliers, shape.columns).data);
    const Device device(check.who, check.device);
    cuda_int8_rows(job, device.stream);
}

void int8_columnwise_quant(py::handle A, float threshold, py::handle out, py::handle stats, int) {
    const Arguments check{"int8_columnwise_quant", device_type};
    const View values = check.floats("A", A);
    const Rows shape(values);
    const View codes = check.sized("out", check.int8("out", out), values.size);
    const View scales = check.float32("stats", stats, shape.columns);
    const Int8ColumnsJob job{values.data,
                             static_cast<int8_t*>(codes.data),
                             static_cast<float*>(scales.data),
                             shape.rows,
                             shape.columns,
                             threshold > 0.0f ? threshold : float_of(inf_bits),
                             values.storage()};
    const Device device(check.who, check.device);
    cuda_int8_columns(job, device.stream);
}

void int8_vectorwise_dequant(py::handle A, py::handle stats, py::handle out, int) {
    const Arguments check{"int8_vectorwise_dequant", device_type};
    const View codes = check.int8("A", A);
    const Rows shape(codes);
    const View scales = check.float32("stats", stats, shape.rows);
    const View values = check.float32("out", out, codes.size);
    const Int8DequantizeJob job{static_cast<const int8_t*>(codes.data), static_cast<const float*>(scales.data),
                                static_cast<float*>(values.data), shape.rows, shape.columns};
    const Device device(check.who, check.device);
    cuda_int8_dequantize(job, device.stream);
}

void int8_mm_dequant(py::handle A, py::handle row_stats, py::handle col_stats, py::handle bias, py::handle out, int) {
    const Arguments check{"int8_mm_dequant", device_type};
    const View sums = check.int32("A", A);
    const Rows shape(sums);
    const View rows = check.float32("row_stats", row_stats, shape.rows);
    const View columns = check.float32("col_stats", col_stats, shape.columns);
    const float* added = nullptr;
    if (!bias.is_none()) added = static_cast<const float*>(check.float32("bias", bias, shape.columns).data);
    const View values = check.sized("out", check.floats("out", out), sums.size);
    const Int8ScaleJob job{static_cast<const int32_t*>(sums.data),
                           static_cast<const float*>(rows.data),
                           static_cast<const float*>(columns.data),
                           added,
                           values.data,
                           shape.rows,
                           shape.columns,
                           values.storage()};
    const Device device(check.who, check.device);
    cuda_int8_scale(job, device.stream);
}

void int8_linear_matmul(py::handle A, py::handle B, py::handle out, int) {
    const Arguments check{"int8_linear_matmul", device_type};
    const View a = check.int8("A", A), b = check.int8("B", B);
    const Rows left(a), right(b);
    if (left.columns != right.columns)
        check.fail("A and B must have the same number of columns, got " + a.describe() + " and " + b.describe() + ".");
    const View sums = check.sized("out", check.int32("out", out), left.rows * right.rows);
    const Int8ProductJob job{static_cast<const int8_t*>(a.data),
                             static_cast<const int8_t*>(b.data),
                             static_cast<int32_t*>(sums.data),
                             left.rows,
                             right.rows,
                             left.columns};
    const Device device(check.who, check.device);
    cuda_int8_product(job, device.stream);
}

constexpr int64_t scalars_size = sizeof(Scalars) / sizeof(float);

const float* optional_scalar(const Arguments& check, const char* argument, py::handle object) {
    return object.is_none() ? nullptr : static_cast<const float*>(check.float32(argument, object, 1).data);
}

// `rows` is the address of `count` Rows that StepTable of optim8._cpu gathered, all on `device`.
void step(uintptr_t rows, int64_t count, int device_index, py::handle scalars, py::handle grad_scale,
          py::handle found_inf) {
    const Arguments check{"optimizer step", device_type};
    check.device = device_index;
    StepInputs inputs{};
    inputs.grad_scale = optional_scalar(check, "grad_scale", grad_scale);
    inputs.found_inf = optional_scalar(check, "found_inf", found_inf);
    if (!scalars.is_none())
        inputs.scalars = static_cast<Scalars*>(check.float32("scalars", scalars, count * scalars_size).data);
    const Device device(check.who, device_index);
    cuda_step(reinterpret_cast<const Row*>(rows), count, inputs, device.stream);
}

std::vector<float> dynamic_map(bool with_sign) {
    const CodeTables& t = with_sign ? Tables<Code::Signed>::all : Tables<Code::Unsigned>::all;
    return std::vector<float>(t.value, t.value + code_size);
}

}  // namespace
}  // namespace optim8

PYBIND11_MODULE(_cuda, m) {
    using namespace optim8;
    using py::arg;
    m.doc() =
        "CUDA kernels of optim8. Internal: use optim8 and optim8.functional. `threads` is there for the likeness "
        "with optim8._cpu.";
    m.attr("version") = OPTIM8_VERSION;
    m.attr("step_block") = step_block;
    m.attr("row_size") = sizeof(Row);
    m.attr("scalars_size") = scalars_size;
    m.def("dynamic_map", &dynamic_map, arg("signed"), "The 256 values of the dynamic code.");
    m.def("quantize_blockwise", &quantize_blockwise, arg("A"), arg("code"), arg("blocksize"), arg("out"), arg("absmax"),
          arg("threads"), arg("keep_positive") = false);
    m.def("dequantize_blockwise", &dequantize_blockwise, arg("A"), arg("absmax"), arg("code"), arg("blocksize"),
          arg("out"), arg("threads"));
    m.def("quantize_4bit", &quantize_4bit, arg("A"), arg("quant_type"), arg("blocksize"), arg("out"), arg("absmax"),
          arg("threads"));
    m.def("dequantize_4bit", &dequantize_4bit, arg("A"), arg("absmax"), arg("quant_type"), arg("blocksize"), arg("out"),
          arg("threads"));
    m.def("gemv_4bit", &gemv_4bit, arg("A"), arg("B"), arg("absmax"), arg("code"), arg("blocksize"), arg("out"),
          arg("threads"));
    m.def("int8_vectorwise_quant", &int8_vectorwise_quant, arg("A"), arg("threshold"), arg("out"), arg("stats"),
          arg("outliers"), arg("threads"));
    m.def("int8_columnwise_quant", &int8_columnwise_quant, arg("A"), arg("threshold"), arg("out"), arg("stats"),
          arg("threads"));
    m.def("int8_vectorwise_dequant", &int8_vectorwise_dequant, arg("A"), arg("stats"), arg("out"), arg("threads"));
    m.def("int8_mm_dequant", &int8_mm_dequant, arg("A"), arg("row_stats"), arg("col_stats"), arg("bias"), arg("out"),
          arg("threads"));
    m.def("int8_linear_matmul", &int8_linear_matmul, arg("A"), arg("B"), arg("out"), arg("threads"));
    m.def("step", &step, arg("rows"), arg("count"), arg("device"), arg("scalars"), arg("grad_scale"), arg("found_inf"),
          "One optimizer step over the rows that optim8._cpu gathered at this address.");
}
