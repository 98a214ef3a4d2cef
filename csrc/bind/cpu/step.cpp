// Running a gathered step, and what Python sees of all this.
#include "bind/step_table.h"
#include "cpu/step/rows.h"
#include "tensors/cut.h"

#include <algorithm>
#include <exception>

namespace optim8 {

DeviceRows* StepTable::on_cpu() {
    const auto found = std::find_if(devices_.begin(), devices_.end(), [](const DeviceRows& d) { return d.on_cpu; });
    return found == devices_.end() || found->rows.empty() ? nullptr : &*found;
}

void DeviceRows::measure(int threads) const {
    Measurement measurement(threads);
    measurement.add(rows.data(), rows.size());
    measurement.end();
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

namespace {

// A hyper-parameter of a group; a flag counts as 0 or 1.
double option_of(const HyperInfo& hyper, const py::dict& group) {
    py::object value = group[hyper.name];
    if (hyper.part >= 0) value = value[py::int_(hyper.part)];
    if (hyper.kind == HyperKind::Flag) return py::bool_(value) ? 1.0 : 0.0;
    if (hyper.kind == HyperKind::Optional && value.is_none()) return 0.0;
    const double number = PyFloat_AsDouble(value.ptr());
    if (number == -1.0 && PyErr_Occurred()) throw py::error_already_set();
    return number;
}

StepOptions values_of(const RuleInfo& rule, const py::dict& group, bool without_lr) {
    StepOptions options;
    options.rule = rule.id;
    for (int i = 0; i < rule.hypers; ++i)
        if (!without_lr || std::string("lr") != rule.hyper[i].name) options.value[i] = option_of(rule.hyper[i], group);
    return options;
}

// The options of a group, for the variant of a rule that steps it: all variants have the same hyper-parameters.
StepOptions values_of_variant(const std::string& family, const py::dict& group, bool without_lr) {
    StepOptions options = values_of(rule_of(family), group, without_lr);
    for (const RuleInfo& rule : rule_table)
        if (family == rule.family && rule.serves(options)) {
            options.rule = rule.id;
            break;
        }
    return options;
}

std::string variant(const std::string& family, const py::dict& group) {
    return rule_info(values_of_variant(family, group, true).rule).name;
}

py::object conflict(const std::string& rule, const py::dict& group) {
    const char* text = rule_of(rule).conflict(values_of(rule_of(rule), group, true));
    return text == nullptr ? py::object(py::none()) : py::str(text);
}

StepOptions options_of(const std::string& owner, const std::string& rule, const py::dict& group, bool maximize,
                       double gradient_scale, bool count_on_device, uintptr_t device_lr, bool dithered, bool direct,
                       int master_bits, bool dithered_param) {
    StepOptions options = values_of_variant(rule, group, device_lr != 0);
    if (const char* text = rule_of(rule).conflict(options)) throw py::value_error(owner + ": " + text);
    options.maximize = maximize;
    options.gradient_scale = gradient_scale;
    options.count_on_device = count_on_device;
    options.device_lr = reinterpret_cast<const float*>(device_lr);
    options.rounding = dithered ? Rounding::Dithered : Rounding::Nearest;
    options.direct = direct;
    options.weight = master_bits == 32   ? Weight::Bits32
                     : master_bits == 24 ? Weight::Bits24
                     : dithered_param    ? Weight::Dithered
                                         : Weight::Plain;
    return options;
}

// The table of rules, as `rules` documents it.
py::list rules() {
    py::list all;
    for (const RuleInfo& rule : rule_table) {
        py::list states, hypers;
        for (int s = 0; s < rule.states; ++s)
            states.append(py::make_tuple(rule.state[s].name, is_signed(rule.state[s].code), rule.state[s].root,
                                         rule.state[s].wide, rule.state[s].initial));
        for (int i = 0; i < rule.hypers; ++i) {
            const HyperInfo& h = rule.hyper[i];
            hypers.append(py::make_tuple(h.name, h.part, h.initial, h.least, h.below, static_cast<int>(h.kind)));
        }
        all.append(py::make_tuple(rule.name, rule.family, rule.torch_name, rule.functional_name, states, hypers,
                                  rule.running, rule.running_start, rule.gives_direction, rule.has_norms));
    }
    return all;
}

}  // namespace

void bind_step(py::module_& m) {
    m.def(
        "rules", &rules,
        "Every rule: (name, family, name in torch.optim or None, name in the functional API or None, [(state, whether "
        "its code is signed, whether codes stand for its root, whether it is wide, the option that it starts as or "
        "None)], [(option, place in its tuple or -1, default, at least, below, 0 for a number, 1 for a flag, 2 for a "
        "number or None)], scalar of each parameter or None, what that starts as, whether "
        "its step gives a direction, whether it has norms).");
    m.def("variant", &variant, py::arg("family"), py::arg("group"),
          "The name of the variant of a rule that steps a group with these options.");
    m.def("conflict", &conflict, py::arg("rule"), py::arg("group"),
          "What is wrong with the options of a group of which each is within its bounds, or None.");
    m.def("cut", &cut, py::arg("flat"), py::arg("begins"), py::arg("shapes"), py::arg("strides"),
          "DLPack capsules of tensors in the memory of a flat one.");
    py::class_<StepOptions>(m, "StepOptions", "The options of a parameter group in a step, and what the step adds.")
        .def(py::init(&options_of), py::arg("owner"), py::arg("rule"), py::arg("group"), py::kw_only(),
             py::arg("maximize") = false, py::arg("gradient_scale") = 1.0, py::arg("count_on_device") = false,
             py::arg("device_lr") = 0, py::arg("dithered") = false, py::arg("direct") = false,
             py::arg("master_bits") = 16, py::arg("dithered_param") = false)
        .def_readonly("count_on_device", &StepOptions::count_on_device)
        .def_property_readonly("rule", [](const StepOptions& o) { return rule_info(o.rule).name; });
    py::class_<Lacks>(m, "Lacks", "What a step lacks before it can run: indices of parameters.")
        .def_readonly("gaps", &Lacks::gaps)
        .def_readonly("state", &Lacks::state)
        .def_readonly("layout", &Lacks::layout)
        .def_readonly("moved", &Lacks::moved)
        .def_readonly("step", &Lacks::step);
    py::class_<DeviceRows>(m, "DeviceRows", "The rows of one device.")
        .def_readonly("device", &DeviceRows::device)
        .def_readonly("count_on_device", &DeviceRows::count_on_device)
        .def_property_readonly("address",
                               [](const DeviceRows& d) { return reinterpret_cast<uintptr_t>(d.rows.data()); })
        .def("count", &DeviceRows::count, "Counts the step on the host, where it is counted there.")
        .def_readonly("places", &DeviceRows::places, "Where the rows are among all rows of the table.")
        .def_property_readonly("has_norms", &DeviceRows::has_norms, "Whether the rule depends on norms of tensors.")
        .def_property_readonly("blocks", &DeviceRows::blocks, "Of 256 values, of all rows.")
        .def(
            "take_sums", [](DeviceRows& d, uintptr_t sums) { d.take_sums(reinterpret_cast<double*>(sums)); },
            py::arg("sums"),
            "Rows on the CPU: where the sums of their squares stand, the address of float64 [rows, 2]. The step takes "
            "them from there, as they are then.")
        .def("measure", &DeviceRows::measure, py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
             "Measures all rows: fills the sums.")
        .def("__len__", [](const DeviceRows& d) { return d.rows.size(); });
    py::class_<StepTable>(m, "StepTable", "All tensors of one step, gathered and checked before anything changes.")
        .def(py::init<>())
        .def("add", &StepTable::add, py::arg("params"), py::arg("state"), py::arg("options"), py::arg("owner"),
             py::arg("group"), py::arg("grads") = py::dict(), py::arg("names_of") = py::none(),
             py::arg("firsts") = py::dict())
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
