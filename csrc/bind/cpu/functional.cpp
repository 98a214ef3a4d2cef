// The native half of optim8.functional beyond blockwise codes: 4-bit codes, LLM.int8(), maps.
#include "bind/jobs.h"
#include "core/codec.h"
#include "core/storage.h"
#include "cpu/dispatch.h"
#include "cpu/huge_pages.h"
#include "cpu/parallel.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

namespace optim8 {
namespace {

const float* values_of(Fourbit type) {
    return type == Fourbit::NF4 ? FourbitOf<Fourbit::NF4>::all.value : FourbitOf<Fourbit::FP4>::all.value;
}

// Values below which waking another thread costs more than it saves.
constexpr int64_t worth_a_thread = 1 << 14;

// `each`: values of an item.
template <class Job>
void run(void (*Kernels::*kernel)(const Job&, int64_t, int64_t), const Job& job, int64_t items, int64_t each,
         int threads) {
    const int64_t values = std::max<int64_t>(1, each);
    const int64_t most = std::max<int64_t>(1, (1 << 18) / values), least = blocks_of(worth_a_thread, values);
    const int64_t chunk = std::max(least, chunk_size(items, threads, most));
    const auto function = kernels().*kernel;
    const py::gil_scoped_release release;
    parallel_for(items, chunk, threads, [&](int64_t begin, int64_t end) { function(job, begin, end); });
}

void quantize_4bit(py::handle A, const std::string& quant_type, int64_t blocksize, py::handle out, py::handle absmax,
                   int threads) {
    const Quantize4Job job = quantize_4bit_job(Arguments{"quantize_4bit"}, A, quant_type, blocksize, out, absmax);
    prefer_huge_pages(job.packed, halves(job.size));
    run(&Kernels::quantize_4bit, job, blocks_of(job.size, fourbit_span), fourbit_span, threads);
}

void dequantize_4bit(py::handle A, py::handle absmax, const std::string& quant_type, int64_t blocksize, py::handle out,
                     int threads) {
    const Arguments check{"dequantize_4bit"};
    const Fourbit type = read_type(check, quant_type);
    Dequantize4Job job = dequantize_4bit_job(check, A, absmax, blocksize, out);
    job.table = values_of(type);
    prefer_huge_pages(job.out, bytes_of(job.size, job.storage));
    run(&Kernels::dequantize_4bit, job, blocks_of(job.size, fourbit_span), fourbit_span, threads);
}

std::vector<float> widened(const View& values) {
    std::vector<float> wide(static_cast<size_t>(values.size));
    with_storage(values.storage(), [&](auto stored) {
        const auto* from = static_cast<const typename decltype(stored)::type*>(values.data);
        for (size_t i = 0; i < wide.size(); ++i) wide[i] = to_float(from[i]);
    });
    return wide;
}

void gemv_4bit(py::handle A, py::handle B, py::handle absmax, py::handle code, int64_t blocksize, py::handle out,
               int threads) {
    const Gemv4Arguments of = gemv_4bit_arguments(Arguments{"gemv_4bit"}, A, B, absmax, code, blocksize, out);
    const View &vector = of.vector, &result = of.result;
    const int64_t weights = vector.size * result.size;
    const bool whole_groups = vector.size % gemv_group == 0;
    std::vector<float> wide = widened(vector);
    if (whole_groups) {
        std::vector<float> ordered(wide.size());
        for (size_t at = 0; at < wide.size(); at += gemv_group)
            for (int64_t turn = 0; turn < 8; ++turn)
                for (int64_t lane = 0; lane < 16; ++lane)
                    ordered[at + static_cast<size_t>(16 * turn + lane)] =
                        wide[at + static_cast<size_t>(gemv_order(turn, lane))];
        wide.swap(ordered);
    }
    const Gemv4Job job{wide.data(),
                       static_cast<const uint8_t*>(of.packed.data),
                       static_cast<const float*>(of.scales.data),
                       static_cast<const float*>(of.table.data),
                       result.data,
                       result.size,
                       vector.size,
                       blocksize,
                       result.storage(),
                       whole_groups};
    // A thread that sleeps may take milliseconds to wake, as this call is short and others come between: more threads
    // must save the time of 8 Mi weights, some tenths of a millisecond.
    const bool saves_enough = threads > 1 && weights / threads * (threads - 1) > (int64_t{1} << 23);
    run(&Kernels::gemv_4bit, job, result.size, vector.size, saves_enough ? threads : 1);
}

void int8_vectorwise_quant(py::handle A, float threshold, py::handle out, py::handle stats, py::handle outliers,
                           int threads) {
    const Int8QuantizeJob job = int8_rows_job(Arguments{"int8_vectorwise_quant"}, A, threshold, out, stats, outliers);
    if (job.outliers != nullptr) {
        std::fill_n(job.outliers, job.columns, uint8_t{0});
        run(&Kernels::int8_outliers, job, job.rows, job.columns, threads);
    }
    prefer_huge_pages(job.codes, job.rows * job.columns);
    run(&Kernels::int8_rows, job, job.rows, job.columns, threads);
}

void int8_columnwise_quant(py::handle A, float threshold, py::handle out, py::handle stats, int threads) {
    const Int8ColumnsJob job = int8_columns_job(Arguments{"int8_columnwise_quant"}, A, threshold, out, stats);
    prefer_huge_pages(job.codes, job.rows * job.columns);
    run(&Kernels::int8_columns, job, blocks_of(job.columns, 64), 64 * job.rows, threads);
}

void int8_vectorwise_dequant(py::handle A, py::handle stats, py::handle out, int threads) {
    const Int8DequantizeJob job = int8_dequantize_job(Arguments{"int8_vectorwise_dequant"}, A, stats, out);
    prefer_huge_pages(job.out, bytes_of(job.rows * job.columns, Storage::Float32));
    run(&Kernels::int8_dequantize, job, job.rows, job.columns, threads);
}

void int8_mm_dequant(py::handle A, py::handle row_stats, py::handle col_stats, py::handle bias, py::handle out,
                     int threads) {
    const Int8ScaleJob job = int8_scale_job(Arguments{"int8_mm_dequant"}, A, row_stats, col_stats, bias, out);
    prefer_huge_pages(job.out, bytes_of(job.rows * job.columns, job.storage));
    run(&Kernels::int8_scale, job, job.rows, job.columns, threads);
}

void int8_linear_matmul(py::handle A, py::handle B, py::handle out, int threads) {
    const Int8ProductJob job = int8_product_job(Arguments{"int8_linear_matmul"}, A, B, out);
    run(&Kernels::int8_product, job, job.rows, job.inner * job.columns, threads);
}

std::vector<float> fourbit_map(const std::string& quant_type) {
    const float* values = values_of(read_type(Arguments{"fourbit_map"}, quant_type));
    return std::vector<float>(values, values + fourbit_size);
}

}  // namespace

void bind_functional(py::module_& m) {
    using py::arg;
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
    m.def("fourbit_map", &fourbit_map, arg("quant_type"), "The 16 values of a 4-bit code.");
}

}  // namespace optim8
