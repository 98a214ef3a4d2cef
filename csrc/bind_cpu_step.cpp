// Gathering the tensors of a step from Python objects, and running it.
#include "bind/step_table.h"
#include "core/codec.h"
#include "core/rules/all.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"

#include <algorithm>

namespace optim8 {
namespace {

struct RuleInfo {
    const char* name;
    RuleId id;
    int states;
};
constexpr RuleInfo rule_infos[] = {
#define OPTIM8_RULE_INFO(name, type) {#name, RuleId::name, type::states},
    OPTIM8_RULES(OPTIM8_RULE_INFO)
#undef OPTIM8_RULE_INFO
};

// The names of the states, in the order of every rule.
constexpr const char* state_names[max_states] = {"exp_avg", "exp_avg_sq"};
constexpr const char* absmax_names[max_states] = {"exp_avg_absmax", "exp_avg_sq_absmax"};

struct Names {
    PyObject *grad, *step, *is_neg, *is_zero, *state[max_states], *absmax[max_states];
    Names() {
        is_neg = PyUnicode_InternFromString("is_neg");
        is_zero = PyUnicode_InternFromString("_is_zerotensor");
        grad = PyUnicode_InternFromString("grad");
        step = PyUnicode_InternFromString("step");
        for (int s = 0; s < max_states; ++s) {
            state[s] = PyUnicode_InternFromString(state_names[s]);
            absmax[s] = PyUnicode_InternFromString(absmax_names[s]);
        }
    }
};

const Names& names() {
    static const Names* made = new Names;
    return *made;
}

// One parameter's place, for messages.
struct Place {
    const std::string& owner;
    int64_t group, index;

    [[noreturn]] void fail(const std::string& what) const {
        throw py::value_error(owner + ": parameter " + std::to_string(index) + " of group " + std::to_string(group) +
                              " " + what);
    }
};

View view_of(PyObject* object, const Place& place, const char* what, const char* advice) {
    View view;
    if (!read_view(object, view)) {
        place.fail(std::string(what) +
                   " is not a dense tensor with memory of its own (sparse, meta or another kind). " + advice);
    }
    return view;
}

void check_memory(const View& view, const Place& place, const char* what) {
    if (view.data == nullptr && view.size != 0)
        place.fail(std::string(what) + " has no memory, got " + view.describe() +
                   " that was freed. Step while it is there.");
}

bool says(py::handle tensor, PyObject* method) {
    const auto answer = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), method));
    if (!answer) throw py::error_already_set();
    return answer.ptr() == Py_True;
}

// A tensor whose memory does not hold its values: lazily negated, or zeros without memory. A copy resolves it.
bool is_lazy(py::handle tensor, const View& view) {
    return says(tensor, names().is_neg) || (view.data == nullptr && says(tensor, names().is_zero));
}

void check_param(const View& p, const Place& place) {
    if (!p.has_storage())
        place.fail("must be float32, bfloat16 or float16, got " + p.describe() +
                   ". Convert the model, or leave this parameter out.");
    if (!p.dense())
        place.fail("must fill its memory without gaps or overlap, got " + p.describe() +
                   ". Make it contiguous with `param.data = param.data.contiguous()`.");
}

void check_grad(const View& p, const View& g, const Place& place) {
    if (!g.same_device(p))
        place.fail("has a gradient on another device: parameter " + p.describe() + ", gradient " + g.describe() +
                   ". Move one of them.");
    if (!g.same_shape(p))
        place.fail("has a gradient of another shape: parameter " + p.describe() + ", gradient " + g.describe() + ".");
    if (!g.has_storage() || (g.storage() != p.storage() && g.storage() != Storage::Float32))
        place.fail("needs a gradient of its own dtype or float32: parameter " + p.describe() + ", gradient " +
                   g.describe() + ". Cast the gradient.");
}

// Runs for every tensor of every step: no text is made unless it fails.
View state_view(PyObject* entry, PyObject* name, const Place& place, Hint& hint) {
    const auto quoted = [&] { return "state['" + std::string(py::str(py::handle(name))) + "']"; };
    PyObject* value = PyDict_GetItemWithError(entry, name);
    if (value == nullptr)
        place.fail("lacks " + quoted() +
                   ". Load a state dict that this optimizer wrote, or clear optimizer.state to start anew.");
    View view;
    if (!read_view(value, view)) place.fail("has a " + quoted() + " that is no dense tensor.");
    hint.add(value, view);
    return view;
}

}  // namespace

void Hint::add(const void* line, int lines) {
    if (count_ < most) ranges_[count_++] = Range{static_cast<const char*>(line), lines};
}

void Hint::add(PyObject* object, const View& view) {
    add(object, 1);
    // Shapes of up to five dimensions lie within torch's tensor object; storage before, dtype and strides behind.
    if (view.shape != nullptr && view.owned.empty()) add(reinterpret_cast<const char*>(view.shape) - 64, 4);
}

void Hint::add_dict(PyObject* object) {
    add(object, 1);
    add(reinterpret_cast<PyDictObject*>(object)->ma_keys, 4);
}

void Hint::prefetch() const {
    for (int r = 0; r < count_; ++r)
        for (int l = 0; l < ranges_[r].lines; ++l) __builtin_prefetch(ranges_[r].begin + 64 * l);
}

void DeviceRows::count() {
    for (size_t r = 0; r < steps.size(); ++r) *steps[r] = next_steps[r];
}

DeviceRows& StepTable::rows_on(const View& param, bool count_on_device) {
    for (DeviceRows& known : devices_)
        if (known.on_cpu == param.on_cpu() && known.device == param.device && known.count_on_device == count_on_device)
            return known;
    devices_.push_back(DeviceRows{param.on_cpu(), param.device, count_on_device, {}, {}, {}});
    return devices_.back();
}

std::vector<DeviceRows*> StepTable::elsewhere() {
    std::vector<DeviceRows*> found;
    for (DeviceRows& known : devices_)
        if (!known.on_cpu && !known.rows.empty()) found.push_back(&known);
    return found;
}

void StepTable::clear() {
    for (DeviceRows& known : devices_) {
        known.rows.clear();
        known.steps.clear();
        known.next_steps.clear();
    }
    hypers_.clear();
    params_ = py::list();
    asked_ = 0;
}

Wanted StepTable::add(py::list params, py::dict state, RuleId rule, const Hyper& hyper, const std::string& owner,
                      int64_t group, py::dict relaid) {
    const RuleInfo& info = rule_infos[static_cast<int>(rule)];
    const Names& key = names();
    Wanted wanted;
    hypers_.push_back(hyper);
    Scalars scalars{};
    float scalars_step = -1;
    const int64_t count = static_cast<int64_t>(params.size());
    for (int64_t i = 0; i < count; ++i) {
        constexpr size_t ahead = 6;
        const Place place{owner, group, i};
        if (asked_ == hints_.size()) hints_.emplace_back();
        if (asked_ + ahead < hints_.size()) hints_[asked_ + ahead].prefetch();
        Hint& hint = hints_[asked_++];
        hint.forget();
        PyObject* param = PyList_GET_ITEM(params.ptr(), i);
        const py::object held = py::reinterpret_steal<py::object>(PyObject_GetAttr(param, key.grad));
        if (!held) throw py::error_already_set();
        if (held.is_none()) continue;
        py::handle grad = held;
        if (relaid.size() != 0) {
            const py::int_ at(i);
            if (relaid.contains(at)) grad = PyDict_GetItem(relaid.ptr(), at.ptr());
        }

        const View p = view_of(param, place, "itself", "Only dense parameters can be stepped.");
        check_memory(p, place, "itself");
        hint.add(param, p);
        check_param(p, place);
        const View g = view_of(grad.ptr(), place, "has a gradient that",
                               "Use sparse=False in the embedding, or torch.optim.SparseAdam for it.");
        if (is_lazy(grad, g)) {
            wanted.layout.push_back(i);
            continue;
        }
        check_memory(g, place, "has a gradient that");
        hint.add(grad.ptr(), g);
        check_grad(p, g, place);
        if (!g.same_layout(p)) {
            wanted.layout.push_back(i);
            continue;
        }
        PyObject* entry = PyDict_GetItemWithError(state.ptr(), param);
        if (entry == nullptr && PyErr_Occurred()) throw py::error_already_set();
        if (entry == nullptr || !PyDict_Check(entry) || PyDict_Size(entry) == 0) {
            wanted.state.push_back(i);
            continue;
        }

        hint.add_dict(entry);
        Row row{};
        row.param = p.data;
        row.grad = g.data;
        row.size = p.size;
        row.rule = rule;
        row.param_storage = p.storage();
        row.grad_storage = g.storage();
        const int64_t blocks = blocks_of(p.size, step_block);
        bool moved = false;
        for (int s = 0; s < info.states; ++s) {
            const View values = state_view(entry, key.state[s], place, hint);
            const bool codes = values.is_uint8();
            const Precision precision = codes ? Precision::Bits8 : Precision::Bits32;
            if ((!codes && !values.is_float32()) || !values.same_shape(p) || !values.same_device(p) ||
                (s > 0 && precision != row.precision))
                place.fail(std::string("needs a state['") + state_names[s] +
                           "'] of uint8 codes or float32, like the parameter " + p.describe() +
                           " in shape and device, got " + values.describe() +
                           ". Load the checkpoint with load_state_dict.");
            moved = moved || !values.same_layout(p);
            row.precision = precision;
            row.state[s] = values.data;
            if (!codes) continue;
            const View absmax = state_view(entry, key.absmax[s], place, hint);
            if (!absmax.is_float32() || absmax.size != blocks || !absmax.contiguous() || !absmax.same_device(p))
                place.fail(std::string("needs a state['") + absmax_names[s] + "'] of float32 [" +
                           std::to_string(blocks) + "] beside the parameter, got " + absmax.describe() +
                           ". Load the checkpoint with load_state_dict.");
            row.absmax[s] = static_cast<float*>(absmax.data);
        }
        if (moved) {
            wanted.moved.push_back(i);
            continue;
        }
        const View step = state_view(entry, key.step, place, hint);
        if (!step.is_float32() || step.size != 1 || !(step.on_cpu() || step.same_device(p)))
            place.fail("needs a state['step'] of float32 () on cpu or beside the parameter, got " + step.describe() +
                       ".");
        row.hyper = &hypers_.back();
        DeviceRows& rows = rows_on(p, !step.on_cpu());
        if (!step.on_cpu()) {
            row.device_step = static_cast<float*>(step.data);
        } else if (hyper.count_on_device && !p.on_cpu()) {
            wanted.step.push_back(i);
            continue;
        } else {
            const float next = *static_cast<float*>(step.data) + 1;
            if (next != scalars_step) {
                scalars = derive(hyper, next);
                scalars_step = next;
            }
            row.scalars = scalars;
            rows.steps.push_back(static_cast<float*>(step.data));
            rows.next_steps.push_back(next);
        }
        rows.rows.push_back(row);
        params_.append(py::handle(param));
    }
    return wanted;
}

DeviceRows* StepTable::on_cpu() {
    const auto found = std::find_if(devices_.begin(), devices_.end(), [](const DeviceRows& d) { return d.on_cpu; });
    return found == devices_.end() || found->rows.empty() ? nullptr : &*found;
}

void StepTable::run_cpu(int threads) {
    DeviceRows* rows = on_cpu();
    if (rows == nullptr) return;
    {
        const py::gil_scoped_release release;
        step_rows(rows->rows, threads);
    }
    rows->count();
}

void step_rows(const std::vector<Row>& rows, int threads) {
    // Work is split by blocks, not by tensors: chunk c covers the same run of blocks whatever tensors they are of.
    std::vector<int64_t> first(rows.size() + 1, 0);
    for (size_t r = 0; r < rows.size(); ++r) first[r + 1] = first[r] + blocks_of(rows[r].size, step_block);
    const Kernels& use = kernels();
    parallel_for(first.back(), chunk_size(first.back(), threads, 1024), threads, [&](int64_t begin, int64_t end) {
        size_t r = static_cast<size_t>(std::upper_bound(first.begin(), first.end(), begin) - first.begin()) - 1;
        for (; begin < end; ++r) {
            const int64_t stop = std::min(end, first[r + 1]);
            if (stop > begin) use.step_blocks(rows[r], begin - first[r], stop - first[r]);
            begin = std::max(begin, stop);
        }
    });
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
        .def(
            "add",
            [](StepTable& table, py::list params, py::dict state, const std::string& rule, const Hyper& hyper,
               const std::string& owner, int64_t group, py::dict relaid) {
                for (const RuleInfo& info : rule_infos)
                    if (rule == info.name) return table.add(params, state, info.id, hyper, owner, group, relaid);
                throw py::value_error("StepTable.add: rule must be one of those in csrc/core/rules/all.h, got '" +
                                      rule + "'.");
            },
            py::arg("params"), py::arg("state"), py::arg("rule"), py::arg("hyper"), py::arg("owner"), py::arg("group"),
            py::arg("relaid"))
        .def("clear", &StepTable::clear)
        .def("run_cpu", &StepTable::run_cpu, py::arg("threads"))
        .def("on_cpu", &StepTable::on_cpu, py::return_value_policy::reference_internal)
        .def_property_readonly("params", &StepTable::params)
        .def("elsewhere", &StepTable::elsewhere, py::return_value_policy::reference_internal)
        .def("__len__", &StepTable::size);
}

}  // namespace optim8
