// What csrc/cuda offers its binding: every function starts kernels on a stream of the current device and returns.
// Addresses are of that device unless said otherwise. Throws std::runtime_error where CUDA reports an error.
#pragma once

#include "core/jobs.h"

#include <cuda_runtime.h>

namespace optim8 {

// What a step takes from device memory, where its learning rate, step counts or loss scale live there.
struct StepInputs {
    const float* grad_scale;  // gradients are divided by it; null: 1
    const float* found_inf;   // not 0: the step is skipped, its counts too; null: never
    // Room for those of each row where rows count their steps on the device, or have norms; else null.
    AnyScalars* scalars;
    bool counted = false;         // the steps are counted already
    double* sums = nullptr;       // of rules with norms: two sums of squares for each row (core/norms.h)
    double* of_blocks = nullptr;  // room for the same of each block, while they are measured
};

// One launch for some hundred rows of one rule and one pair of types; where steps are counted on the device, a small
// one before it, and one where rules have norms. `rows` is host memory. Every row has scalars, or none.
void cuda_step(const Row* rows, int64_t count, const StepInputs& inputs, cudaStream_t stream);
// Counts the step of rows that count on the device, and derives their scalars; cuda_step does so too unless told.
void cuda_count(const Row* rows, int64_t count, const StepInputs& inputs, cudaStream_t stream);
// Measures rows of rules with norms into inputs.sums. Steps that are counted on the device are counted before.
void cuda_measure(const Row* rows, int64_t count, const StepInputs& inputs, cudaStream_t stream);

// job.kind Any: `code_info` gets the midpoints of job.code and whether it is a dynamic map (code_info_size floats), so
// that such a map is encoded by its formula, as on the CPU, without the host ever looking at it.
constexpr int code_info_size = 256;
void cuda_quantize(QuantizeJob job, float* code_info, cudaStream_t stream);
void cuda_dequantize(const DequantizeJob& job, cudaStream_t stream);

// For which architecture the current device's kernels are compiled, ten times its number as in 90, and from which PTX.
// Loads the module there; throws where it cannot run there.
struct KernelImage {
    int binary, ptx;
};
KernelImage cuda_image();

void cuda_quantize_4bit(const Quantize4Job& job, cudaStream_t stream);
void cuda_dequantize_4bit(const Dequantize4Job& job, Fourbit type, cudaStream_t stream);  // job.table is not read

// out[r] = sum over k of weight[r, k] * vector[k], weight packed row after row. The sum's order is that of the CPU.
struct CudaGemv4Job {
    const void* vector;
    const uint8_t* packed;
    const float* absmax;
    const float* table;  // the 16 values of the code
    void* out;
    int64_t rows, columns, blocksize;
    Storage vector_storage, storage;
};
void cuda_gemv_4bit(const CudaGemv4Job& job, cudaStream_t stream);

void cuda_int8_rows(const Int8QuantizeJob& job, cudaStream_t stream);  // marks outliers first where asked
void cuda_int8_columns(const Int8ColumnsJob& job, cudaStream_t stream);
void cuda_int8_dequantize(const Int8DequantizeJob& job, cudaStream_t stream);
void cuda_int8_scale(const Int8ScaleJob& job, cudaStream_t stream);
void cuda_int8_product(const Int8ProductJob& job, cudaStream_t stream);

}  // namespace optim8
