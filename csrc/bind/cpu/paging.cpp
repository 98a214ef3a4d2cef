// Paged state: a step in buckets, and the pages of memory-mapped files. What is paged is decided in optim8.paging.
#include "bind/step_table.h"
#include "cpu/direct_io.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"
#include "cpu/step/rows.h"
#include "cpu/step/streaming.h"

#include <algorithm>
#include <memory>
#include <new>
#include <optional>
#include <utility>

PYBIND11_MAKE_OPAQUE(optim8::Buckets)

namespace optim8 {
namespace {

bool release_all(const std::vector<Span>& spans) {
    bool taken = true;
    for (const Span& span : spans) taken = release_pages(span.first, span.second) && taken;
    return taken;
}

void open_all(const std::vector<Span>& spans, int threads) {
    constexpr uintptr_t piece = uintptr_t{1} << 20;
    std::vector<Span> pieces;
    for (const Span& span : spans)
        for (uintptr_t at = span.first; at < span.second; at += piece)
            pieces.emplace_back(at, std::min(span.second, at + piece));
    parallel_for(static_cast<int64_t>(pieces.size()), 1, threads, [&](int64_t begin, int64_t end) {
        for (; begin < end; ++begin)
            open_pages(pieces[static_cast<size_t>(begin)].first, pieces[static_cast<size_t>(begin)].second);
    });
}

// work(rows) for the rows of each bucket, where the files are mapped. `ahead`: bytes to have fetched before they are
// worked on; `release`: let go of each bucket's pages behind the work.
template <class Work>
void each_mapped(const Buckets& buckets, int threads, int64_t ahead, bool release, const Work& work) {
    size_t fetched = 0;
    int64_t waiting = 0;  // bytes that were fetched and not yet worked on
    for (const Bucket& bucket : buckets) {
        for (; fetched < buckets.size() && waiting < ahead; ++fetched) {
            for (const Span& span : buckets[fetched].spans) fetch_pages(span.first, span.second);
            waiting += buckets[fetched].bytes;
        }
        if (release) open_all(bucket.spans, threads);
        work(bucket.rows);
        waiting -= bucket.bytes;
        if (release) release_all(bucket.spans);
    }
}

void step_mapped(const Buckets& buckets, int threads, int64_t ahead, bool release) {
    each_mapped(buckets, threads, ahead, release, [&](const std::vector<Row>& rows) { step_rows(rows, threads); });
}

void measure_mapped(const Buckets& buckets, int threads, int64_t ahead, bool release) {
    Measurement measurement(threads);
    each_mapped(buckets, threads, ahead, release,
                [&](const std::vector<Row>& rows) { measurement.add(rows.data(), rows.size()); });
    measurement.end();
}

// The share of mapped files that is in the page cache, from 0 to 1, told from one page of each MiB: asking for all
// takes as long as a tenth of a step.
double share_in_memory(const std::vector<Span>& spans) {
    constexpr uintptr_t apart = uintptr_t{1} << 20;
    int64_t asked = 0, found = 0;
    for (const Span& span : spans)
        for (uintptr_t at = span.first; at < span.second; at += apart, ++asked) found += page_in_memory(at);
    return asked == 0 ? 1 : static_cast<double>(found) / static_cast<double>(asked);
}

// One call for the whole step: a signal handler of Python that raises must not end it in the middle.
bool run_copied(const Buckets& buckets, int threads, int64_t ahead, const std::vector<std::pair<Span, int>>& files,
                const DirectMemory& memory, size_t slots) {
    std::optional<DiskError> failed;
    bool done = false;
    {
        const py::gil_scoped_release no_gil;
        std::vector<PagedFile> open;
        for (const auto& [span, handle] : files) open.push_back({span, handle});
        try {
            done = step_copied(buckets, open, memory, {slots, threads, ahead});
        } catch (const DiskError& error) {
            failed = error;
        }
    }
    if (!failed) return done;
    const char* what = failed->writing ? "written" : "read";
    PyErr_SetObject(PyExc_OSError, py::make_tuple(failed->number, what).ptr());
    throw py::error_already_set();
}

}  // namespace

void bind_paging(py::module_& m) {
    py::class_<Bucket>(m, "Bucket", "A run of blocks of a step, and the paged memory that it uses.")
        .def_readonly("spans", &Bucket::spans, "Addresses [begin, end) in whole pages.")
        .def_readonly("bytes", &Bucket::bytes, "Bytes of paged state.")
        .def("__len__", [](const Bucket& b) { return b.rows.size(); });
    py::class_<Buckets>(m, "Buckets", "A step, cut so that it can stream its state.")
        .def(py::init([](const DeviceRows& rows, const std::vector<Span>& paged, int64_t bytes) {
                 return cut_buckets(rows.rows, paged, bytes);
             }),
             py::arg("rows"), py::arg("paged"), py::arg("bytes"))
        .def("__len__", [](const Buckets& b) { return b.size(); })
        .def(
            "__getitem__",
            [](const Buckets& b, size_t i) -> const Bucket& {
                if (i >= b.size()) throw py::index_error();
                return b[i];
            },
            py::return_value_policy::reference_internal)
        .def("run_mapped", &step_mapped, py::arg("threads"), py::arg("ahead"), py::arg("release"),
             py::call_guard<py::gil_scoped_release>(),
             "Steps all rows on the CPU where their state is mapped, without counting the step. `ahead`: bytes to have "
             "the system fetch before they are stepped; `release`: let go of each bucket's pages behind the step.")
        .def("measure_mapped", &measure_mapped, py::arg("threads"), py::arg("ahead"), py::arg("release"),
             py::call_guard<py::gil_scoped_release>(), "Measures all rows so, and changes nothing.")
        .def("run_copied", &run_copied, py::arg("threads"), py::arg("ahead"), py::arg("files"), py::arg("memory"),
             py::arg("slots"),
             "The same in `memory`, where up to `slots` buckets at a time are read, stepped and written. False: that "
             "cannot be, and nothing is done. `files`: where each file is mapped, and a handle of it. OSError: the "
             "disk failed when something was 'read' or 'written'; rows were stepped until then.");
    m.def("share_in_memory", &share_in_memory, py::arg("spans"), py::call_guard<py::gil_scoped_release>(),
          "The share of mapped files that the system has in memory, from 0 to 1, by sample.");
    py::class_<DirectMemory>(m, "DirectMemory", "Memory that a step reads state into.")
        .def(py::init([](size_t bytes) {
                 auto memory = std::make_unique<DirectMemory>(bytes / 4096 * 4096);
                 if (memory->data() == nullptr) throw std::bad_alloc();
                 return memory;
             }),
             py::arg("bytes"))
        .def_property_readonly("size", &DirectMemory::size, "Bytes.");
    m.def(
        "release_pages",
        [](const std::vector<Span>& spans) {
            const py::gil_scoped_release no_gil;
            return release_all(spans);
        },
        py::arg("spans"), "Takes pages of shared file mappings out of this process; False where they are locked.");
}

}  // namespace optim8
