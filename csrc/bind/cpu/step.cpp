// Running a gathered step, and what Python sees of all this.
#include "bind/step_table.h"
#include "cpu/step/rows.h"

#include <algorithm>
#include <exception>

namespace optim8 {

DeviceRows* StepTable::on_cpu() {
    const auto found = std::find_if(devices_.begin(), devices_.end(), [](const DeviceRows& d) { return d.on_cpu; });
    return found == devices_.end() || found->rows.empty() ? nullptr : &*found;
}

void StepTable::run_cpu(int threads, const py::function& meanwhile) {
    static const std::vector<Row> none;
    DeviceRows* rows = on_cpu();
    PyThreadState* released = nullptr;
    std::exception_ptr failed;
    step_rows(rows == nullptr ? none : rows->rows, threads, [&] {
        try {
            meanwhile();
        } catch (...) {
            failed = std::current_exception();  // no exception may leave a thread of the pool, nor a step half done
        }
        released = PyEval_SaveThread();
    });
    PyEval_RestoreThread(released);
    if (rows != nullptr) rows->count();
    if (failed) std::rethrow_exception(failed);
}

void bind_step(py::module_& m) {
    py::class_<Hyper>(m, "Hyper", "The named scalars of a step, as the user set them.")
        .def(py::init([](double lr, double beta1, double beta2, double eps, double weight_decay, bool maximize,
                         double gradient_scale, bool count_on_device, uintptr_t device_lr) {
                 return Hyper{lr,
                              beta1,
                              beta2,
                              eps,
                              weight_decay,
                              maximize,
                              gradient_scale,
                              count_on_device,
                              reinterpret_cast<const float*>(device_lr)};
             }),
             py::kw_only(), py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps") = 0.0,
             py::arg("weight_decay") = 0.0, py::arg("maximize") = false, py::arg("gradient_scale") = 1.0,
             py::arg("count_on_device") = false, py::arg("device_lr") = 0);
    py::class_<Wanted>(m, "Wanted", "What a step needs from Python before it can run.")
        .def_readonly("gaps", &Wanted::gaps)
        .def_readonly("state", &Wanted::state)
        .def_readonly("layout", &Wanted::layout)
        .def_readonly("moved", &Wanted::moved)
        .def_readonly("step", &Wanted::step);
    py::class_<DeviceRows>(m, "DeviceRows", "The rows of one device.")
        .def_readonly("device", &DeviceRows::device)
        .def_readonly("count_on_device", &DeviceRows::count_on_device)
        .def_property_readonly("address",
                               [](const DeviceRows& d) { return reinterpret_cast<uintptr_t>(d.rows.data()); })
        .def("count", &DeviceRows::count, "Counts the step on the host, where it is counted there.")
        .def("__len__", [](const DeviceRows& d) { return d.rows.size(); });
    py::class_<StepTable>(m, "StepTable", "All tensors of one step, gathered and checked before anything changes.")
        .def(py::init<>())
        .def("add", &StepTable::add, py::arg("params"), py::arg("state"), py::arg("rule"), py::arg("hyper"),
             py::arg("owner"), py::arg("group"), py::arg("relaid"), py::arg("names_of") = py::none())
        .def("same_memory", &StepTable::same_memory,
             "Two rows, by position in params, whose parameters begin at the "
             "same address, or None.")
        .def("clear", &StepTable::clear)
        .def("allow_host", &StepTable::allow_host, py::arg("spans"),
             "Addresses [begin, end) of pinned memory in which state of CUDA parameters may be, until `clear`.")
        .def("run_cpu", &StepTable::run_cpu, py::arg("threads"), py::arg("meanwhile"))
        .def("on_cpu", &StepTable::on_cpu, py::return_value_policy::reference_internal)
        .def_property_readonly("params", &StepTable::params)
        .def("elsewhere", &StepTable::elsewhere, py::return_value_policy::reference_internal)
        .def("__len__", &StepTable::size);
}

}  // namespace optim8
