// The module optim8._cuda: the functions of optim8._cpu for tensors on CUDA devices, and the step over gathered rows.
// Work goes to torch's current stream of the tensors' device; nothing here waits for it.
#include "bind/codec.h"
#include "bind/jobs.h"
#include "core/codec.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"

#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

// The tests run this module on memory of the CPU, over a shim of CUDA.
#if !defined(OPTIM8_DEVICE_TYPE)
#define OPTIM8_DEVICE_TYPE dlpack::cuda
#endif

namespace optim8 {
namespace {

constexpr int32_t device_type = OPTIM8_DEVICE_TYPE;

// A device made current for the time of a call, and torch's stream there. torch makes it current, and the one before
// again: it knows which devices are in use, and cudaSetDevice would take memory for a context on one that is not.
class Device {
  public:
    Device(const char* who, int index) {
        int current = 0;
        check_cuda(who, cudaGetDevice(&current));
        const int chosen = index < 0 ? current : index;
        const auto cuda = py::module_::import("torch").attr("cuda");
        stream =
            reinterpret_cast<cudaStream_t>(cuda.attr("current_stream")(chosen).attr("cuda_stream").cast<uintptr_t>());
        if (chosen == current) return;
        py::object guard = cuda.attr("device")(chosen);
        guard.attr("__enter__")();
        guard_ = std::move(guard);  // after what may throw
    }
    ~Device() {
        if (!guard_) return;
        try {
            guard_.attr("__exit__")(py::none(), py::none(), py::none());
        } catch (py::error_already_set& error) {
            error.discard_as_unraisable("optim8._cuda");
        }
    }
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;

    cudaStream_t stream = nullptr;

  private:
    py::object guard_;
};

// What the module is built of, and whether it runs on a device.
py::dict probe(int device_index) {
    const Device device("optim8._cuda", device_index);
    int driver = 0, toolkit = 0;
    check_cuda("optim8._cuda", cudaDriverGetVersion(&driver));
    check_cuda("optim8._cuda", cudaRuntimeGetVersion(&toolkit));
    if (driver < oldest_driver)
        throw std::runtime_error("optim8._cuda: needs a driver for CUDA 12.1 or newer (R530), got one for CUDA " +
                                 std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10) +
                                 ". Update the driver.");
    const KernelImage image = cuda_image();
    py::dict found;
    found["driver"] = driver;
    found["toolkit"] = toolkit;
    found["binary"] = image.binary;
    found["ptx"] = image.ptx;
    return found;
}

// Device memory of torch's allocator, beside `near`. Kernels on the stream may use it when the object is gone.
py::object float_scratch(py::handle near, int64_t size) { return near.attr("new_empty")(size); }

void check_blocksize(const Arguments& check, int64_t blocksize) {
    if (blocksize < 1 || blocksize > 1 << 30)
        check.fail("blocksize must be from 1 to 2^30, got " + std::to_string(blocksize) + ".");
}

void quantize_blockwise(py::handle A, py::handle code, int64_t blocksize, py::handle out, py::handle absmax, int,
                        bool keep_positive) {
    const Arguments check{"quantize_blockwise", device_type};
    check_blocksize(check, blocksize);
    QuantizeJob job = quantize_blockwise_job(check, A, code, blocksize, out, absmax);
    if (keep_positive) job.kind = CodeKind::Positive;
    const py::object info = float_scratch(code, code_info_size);
    const Device device(check.who, check.device);
    cuda_quantize(job, static_cast<float*>(check.float32("scratch", info, code_info_size).data), device.stream);
}

void dequantize_blockwise(py::handle A, py::handle absmax, py::handle code, int64_t blocksize, py::handle out, int) {
    const Arguments check{"dequantize_blockwise", device_type};
    check_blocksize(check, blocksize);
    const DequantizeJob job = dequantize_blockwise_job(check, A, absmax, code, blocksize, out);
    const Device device(check.who, check.device);
    cuda_dequantize(job, device.stream);
}

void quantize_4bit(py::handle A, const std::string& quant_type, int64_t blocksize, py::handle out, py::handle absmax,
                   int) {
    const Arguments check{"quantize_4bit", device_type};
    const Quantize4Job job = quantize_4bit_job(check, A, quant_type, blocksize, out, absmax);
    const Device device(check.who, check.device);
    cuda_quantize_4bit(job, device.stream);
}

void dequantize_4bit(py::handle A, py::handle absmax, const std::string& quant_type, int64_t blocksize, py::handle out,
                     int) {
    const Arguments check{"dequantize_4bit", device_type};
    const Fourbit type = read_type(check, quant_type);
    const Dequantize4Job job = dequantize_4bit_job(check, A, absmax, blocksize, out);
    const Device device(check.who, check.device);
    cuda_dequantize_4bit(job, type, device.stream);
}

void gemv_4bit(py::handle A, py::handle B, py::handle absmax, py::handle code, int64_t blocksize, py::handle out, int) {
    const Arguments check{"gemv_4bit", device_type};
    const Gemv4Arguments of = gemv_4bit_arguments(check, A, B, absmax, code, blocksize, out);
    const CudaGemv4Job job{of.vector.data,
                           static_cast<const uint8_t*>(of.packed.data),
                           static_cast<const float*>(of.scales.data),
                           static_cast<const float*>(of.table.data),
                           of.result.data,
                           of.result.size,
                           of.vector.size,
                           blocksize,
                           of.vector.storage(),
                           of.result.storage()};
    const Device device(check.who, check.device);
    cuda_gemv_4bit(job, device.stream);
}

void int8_vectorwise_quant(py::handle A, float threshold, py::handle out, py::handle stats, py::handle outliers, int) {
    const Arguments check{"int8_vectorwise_quant", device_type};
    const Int8QuantizeJob job = int8_rows_job(check, A, threshold, out, stats, outliers);
    const Device device(check.who, check.device);
    cuda_int8_rows(job, device.stream);
}

void int8_columnwise_quant(py::handle A, float threshold, py::handle out, py::handle stats, int) {
    const Arguments check{"int8_columnwise_quant", device_type};
    const Int8ColumnsJob job = int8_columns_job(check, A, threshold, out, stats);
    const Device device(check.who, check.device);
    cuda_int8_columns(job, device.stream);
}

void int8_vectorwise_dequant(py::handle A, py::handle stats, py::handle out, int) {
    const Arguments check{"int8_vectorwise_dequant", device_type};
    const Int8DequantizeJob job = int8_dequantize_job(check, A, stats, out);
    const Device device(check.who, check.device);
    cuda_int8_dequantize(job, device.stream);
}

void int8_mm_dequant(py::handle A, py::handle row_stats, py::handle col_stats, py::handle bias, py::handle out, int) {
    const Arguments check{"int8_mm_dequant", device_type};
    const Int8ScaleJob job = int8_scale_job(check, A, row_stats, col_stats, bias, out);
    const Device device(check.who, check.device);
    cuda_int8_scale(job, device.stream);
}

void int8_linear_matmul(py::handle A, py::handle B, py::handle out, int) {
    const Arguments check{"int8_linear_matmul", device_type};
    const Int8ProductJob job = int8_product_job(check, A, B, out);
    const Device device(check.who, check.device);
    cuda_int8_product(job, device.stream);
}

constexpr int64_t scalars_size = max_scalars;

const float* optional_scalar(const Arguments& check, const char* argument, py::handle object) {
    return object.is_none() ? nullptr : static_cast<const float*>(check.float32(argument, object, 1).data);
}

// `rows` is the address of `count` Rows that StepTable of optim8._cpu gathered, all on `device`.
StepInputs inputs_of(const Arguments& check, int64_t count, py::handle scalars, py::handle grad_scale,
                     py::handle found_inf, uintptr_t sums) {
    StepInputs inputs{};
    inputs.sums = reinterpret_cast<double*>(sums);
    inputs.grad_scale = optional_scalar(check, "grad_scale", grad_scale);
    inputs.found_inf = optional_scalar(check, "found_inf", found_inf);
    if (!scalars.is_none())
        inputs.scalars = static_cast<AnyScalars*>(check.float32("scalars", scalars, count * scalars_size).data);
    return inputs;
}

void step(uintptr_t rows, int64_t count, int device_index, py::handle scalars, py::handle grad_scale,
          py::handle found_inf, uintptr_t sums, bool counted) {
    const Arguments check{"optimizer step", device_type};
    check.device = device_index;
    StepInputs inputs = inputs_of(check, count, scalars, grad_scale, found_inf, sums);
    inputs.counted = counted;
    const Device device(check.who, device_index);
    cuda_step(reinterpret_cast<const Row*>(rows), count, inputs, device.stream);
}

void measure(uintptr_t rows, int64_t count, int device_index, py::handle scalars, py::handle grad_scale,
             py::handle found_inf, uintptr_t sums, uintptr_t of_blocks) {
    const Arguments check{"optimizer step", device_type};
    check.device = device_index;
    StepInputs inputs = inputs_of(check, count, scalars, grad_scale, found_inf, sums);
    inputs.of_blocks = reinterpret_cast<double*>(of_blocks);
    const Device device(check.who, device_index);
    cuda_measure(reinterpret_cast<const Row*>(rows), count, inputs, device.stream);
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
    bind_codec(m);
    m.attr("architectures") = OPTIM8_CUDA_ARCHS;
    m.attr("toolkit") = CUDART_VERSION;
    m.def(
        "probe", &probe, arg("device"),
        "What runs on a device: `driver` and `toolkit`, versions as 1000 * major + 10 * minor; `binary` and `ptx`, the "
        "architectures that kernels are compiled for, as 10 * major + minor. Raises RuntimeError, with advice, where "
        "the module does not run there.");
    m.attr("row_size") = sizeof(Row);
    m.attr("scalars_offset") = offsetof(Row, scalars);
    m.attr("scalars_size") = scalars_size;
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
    m.def(
        "step", &step, arg("rows"), arg("count"), arg("device"), arg("scalars"), arg("grad_scale"), arg("found_inf"),
        arg("sums") = 0, arg("counted") = false,
        "One optimizer step over the rows that optim8._cpu gathered at this address. `sums`: of a rule with norms, the "
        "address of what `measure` gave; `counted`: that has counted the step.");
    m.def(
        "measure", &measure, arg("rows"), arg("count"), arg("device"), arg("scalars"), arg("grad_scale"),
        arg("found_inf"), arg("sums"), arg("of_blocks"),
        "The sums of squares that a rule with norms depends on, at the address of float64 [count, 2]. `of_blocks`: the "
        "address of float64 [blocks of all rows, 2]. Counts the step where the device does.");
}
