// Gathering the tensors of a step from Python objects.
#include "bind/checks.h"
#include "bind/step_table.h"
#include "core/codec.h"
#include "core/rule_table.h"

#include <algorithm>
#include <iterator>

namespace optim8 {
namespace {

constexpr const char* step_name = "step";
// Of the keys of state in codes, as Python makes them too (rules.Moment).
constexpr const char *root_suffix = "_root", *codes_suffix = "_codes", *low_suffix = "_low", *absmax_suffix = "_absmax";

PyObject* interned(const std::string& name) { return PyUnicode_InternFromString(name.c_str()); }

// A key of a parameter's state, as C++ and as Python have it.
struct Key {
    std::string text;
    PyObject* object;
    explicit Key(const std::string& name) : text(name), object(interned(name)) {}
};

// The keys of the states of a rule, in its order: of float32 values, of codes, low bytes and scales. `direct`: codes
// stand for the states themselves, also where the rule has roots.
struct StateKeys {
    std::vector<Key> values, codes, low, absmax;
    std::vector<Key> running;       // one or none
    std::vector<bool> wide;         // by state: whether it has low bytes where others have codes alone
    Py_ssize_t own[3] = {1, 1, 1};  // how many keys a state has, by precision
    StateKeys(const RuleInfo& rule, bool direct) {
        if (rule.running != nullptr) running.emplace_back(rule.running);
        for (Py_ssize_t& count : own) count += static_cast<Py_ssize_t>(running.size());
        for (int s = 0; s < rule.states; ++s) {
            wide.push_back(rule.state[s].wide && !direct);
            own[static_cast<int>(Precision::Bits8)] += wide.back() ? 3 : 2;
            own[static_cast<int>(Precision::Bits16)] += 3;
            own[static_cast<int>(Precision::Bits32)] += 1;
            const std::string name = rule.state[s].name;
            const std::string coded = rule.state[s].root && !direct ? name + root_suffix : name;
            values.emplace_back(name);
            codes.emplace_back(coded + codes_suffix);
            low.emplace_back(coded + low_suffix);
            absmax.emplace_back(coded + absmax_suffix);
        }
    }
};

struct Names {
    PyObject *grad = interned("grad"), *is_neg = interned("is_neg"), *is_zero = interned("_is_zerotensor");
    Key step{step_name}, param_low{"param_low"};
    std::vector<StateKeys> of_rule, of_rule_direct;
    Names() {
        for (const RuleInfo& rule : rule_table) {
            of_rule.emplace_back(rule, false);
            of_rule_direct.emplace_back(rule, true);
        }
    }
};

const Names& names() {
    static const Names* all = new Names;
    return *all;
}

std::string quoted(const Key& key) { return "state['" + key.text + "']"; }

// These two run for every tensor of every step: no text is made unless they fail.
PyObject* entry_of(InOrder& entries, const Key& key, const Place& place) {
    PyObject* value = entries.find(key.object);
    if (value == nullptr)
        place.fail("lacks " + quoted(key) +
                   ". Load a state dict that this optimizer wrote, or clear optimizer.state to start anew.");
    return value;
}

// Code that knows torch's names may put values beside codes, for instance to reset state. A step would ignore them.
void check_one_kind(PyObject* entry, const StateKeys& keys, Precision precision, const Place& place) {
    const bool codes = precision != Precision::Bits32;
    if (PyDict_Size(entry) <= keys.own[static_cast<int>(precision)]) return;
    for (size_t s = 0; s < keys.values.size(); ++s)
        if (PyDict_Contains(entry, (codes ? keys.values : keys.codes)[s].object) == 1)
            place.fail("has both " + quoted(keys.values[s]) + " and " + quoted(keys.codes[s]) +
                       ", of which one would be ignored. Delete one; to begin anew, call "
                       "optimizer.reset_state(parameter) instead of replacing state.");
}

View state_view(PyObject* value, const Key& key, const Place& place, Hint& hint) {
    View view;
    if (!read_view(value, view)) place.fail("has a " + quoted(key) + " that is no dense tensor.");
    if (view.data == nullptr && view.size != 0)
        check_memory(value, view, place, ("has a " + quoted(key) + " that").c_str());
    hint.add(value, view);
    return view;
}

// Where in the whole parameter the local one begins, in values.
int64_t first_of(const py::dict& firsts, int64_t index) {
    if (firsts.size() == 0) return 0;
    PyObject* first = PyDict_GetItemWithError(firsts.ptr(), py::int_(index).ptr());
    if (first == nullptr) {
        if (PyErr_Occurred()) throw py::error_already_set();
        return 0;
    }
    return py::cast<int64_t>(first);
}

}  // namespace

TensorQueries::TensorQueries() : grad(names().grad), is_neg(names().is_neg), is_zero(names().is_zero) {}

bool TensorQueries::is_lazy(PyObject* tensor, const View& view) {
    return is_neg.of(tensor) || (view.data == nullptr && is_zero.of(tensor));
}

const RuleInfo& rule_of(const std::string& name) {
    for (const RuleInfo& rule : rule_table)
        if (name == rule.name) return rule;
    throw py::value_error("rule must be one of those in csrc/core/rules/all.h, got '" + name + "'.");
}

StepTable::Counts StepTable::read_state(PyObject* entry, const RuleInfo& rule, const View& p, const Place& place,
                                        Hint& hint, Row& row, bool& moved) {
    const StateKeys& keys = (row.direct ? names().of_rule_direct : names().of_rule)[static_cast<size_t>(rule.id)];
    const int64_t blocks = blocks_of(p.size, step_block);
    InOrder values_of(entry);
    PyObject* count = entry_of(values_of, names().step, place);
    PyObject* running = keys.running.empty() ? nullptr : entry_of(values_of, keys.running[0], place);
    bool narrow_seen = false;
    for (size_t s = 0; s < keys.values.size(); ++s) {
        PyObject* tensor = nullptr;
        if (s == 0) {  // all states have the precision of the first
            tensor = values_of.is_next(keys.values[s].object) ? nullptr : values_of.find(keys.codes[s].object);
            row.precision = tensor != nullptr ? Precision::Bits8 : Precision::Bits32;
        }
        const bool codes = row.precision != Precision::Bits32;
        const Key& key = (codes ? keys.codes : keys.values)[s];
        if (tensor == nullptr) tensor = entry_of(values_of, key, place);
        const View values = state_view(tensor, key, place, hint);
        if (!(codes ? values.is_uint8() : values.is_float32()) || !values.same_shape(p) || !reaches(p, values))
            place.fail("needs a " + quoted(key) + " of " + (codes ? "uint8 codes" : "float32") +
                       ", like the parameter " + p.describe() + " in shape and device, got " + values.describe() +
                       ". Load the checkpoint with load_state_dict.");
        moved = moved || !values.same_layout(p);
        row.state[s] = values.data;
        if (!codes) continue;
        if (!keys.wide[s] && !narrow_seen) {
            narrow_seen = true;
            if (!values_of.is_next(keys.absmax[s].object) && PyDict_Contains(entry, keys.low[s].object) == 1)
                row.precision = Precision::Bits16;
        }
        if (keys.wide[s] || row.precision == Precision::Bits16) {
            const View low = state_view(entry_of(values_of, keys.low[s], place), keys.low[s], place, hint);
            if (!low.is_uint8() || !low.same_shape(p) || !low.same_layout(values) || !reaches(p, low))
                place.fail("needs a " + quoted(keys.low[s]) + " of uint8 like the codes, got " + low.describe() +
                           ". Load the checkpoint with load_state_dict.");
            row.low[s] = static_cast<uint8_t*>(low.data);
        }
        const View absmax = state_view(entry_of(values_of, keys.absmax[s], place), keys.absmax[s], place, hint);
        if (!absmax.is_float32() || absmax.size != blocks || !absmax.contiguous() || !reaches(p, absmax))
            place.fail("needs a " + quoted(keys.absmax[s]) + " of float32 [" + std::to_string(blocks) +
                       "] beside the parameter, got " + absmax.describe() +
                       ". Load the checkpoint with load_state_dict.");
        row.absmax[s] = static_cast<float*>(absmax.data);
    }
    read_param_low(values_of, p, place, hint, row, moved);
    check_one_kind(entry, keys, row.precision, place);
    const auto scalar = [&](PyObject* value, const Key& key) {
        View view = state_view(value, key, place, hint);
        if (!view.is_float32() || view.size != 1 || !(view.on_cpu() || view.same_device(p)))
            place.fail("needs a " + quoted(key) + " of float32 () on cpu or beside the parameter, got " +
                       view.describe() + ".");
        return view;
    };
    Counts counts;
    const View step = scalar(count, names().step);
    counts.on_cpu = step.on_cpu();
    counts.step = static_cast<float*>(step.data);
    if (running != nullptr) {
        const View beside = scalar(running, keys.running[0]);
        if (beside.on_cpu() != step.on_cpu())
            place.fail("needs its " + quoted(keys.running[0]) + " where its " + quoted(names().step) +
                       " is. Load the checkpoint with load_state_dict.");
        counts.running = static_cast<float*>(beside.data);
    }
    return counts;
}

// The low bits of a weight that is wider than its parameter.
void StepTable::read_param_low(InOrder& values_of, const View& p, const Place& place, Hint& hint, Row& row,
                               bool& moved) const {
    const int64_t bytes = bytes_of(row.weight);
    if (bytes == 0) return;
    const Key& key = names().param_low;
    const View low = state_view(entry_of(values_of, key, place), key, place, hint);
    if (!(bytes == 1 ? low.is_uint8() : low.is_int16()) || !low.same_shape(p) || !reaches(p, low))
        place.fail("needs a " + quoted(key) + " of " + (bytes == 1 ? "uint8" : "int16") + ", like the parameter " +
                   p.describe() + " in shape and device, got " + low.describe() +
                   ". Load the checkpoint with load_state_dict, which brings it to the master_bits of its group.");
    moved = moved || !low.same_layout(p);
    row.param_low = low.data;
}

// The scalars of a step that the host counts, for this parameter.
const AnyScalars& StepTable::scalars_of_next(const RuleInfo& rule, const StepOptions& options, const Counts& counts,
                                             DeviceRows& rows) {
    const float next = counts.step == nullptr ? 1 : *counts.step + 1;
    const float running = counts.running == nullptr ? 0 : *counts.running;
    if (!last_.valid || next != last_.step || running != last_.running) {
        float moved_on = running;
        scalars_.push_back(rule.derive(options, next, moved_on));
        last_ = {true, next, running, moved_on};
    }
    const auto write_back = [&](float* at, float value) {
        if (at == nullptr) return;
        rows.steps.push_back(at);
        rows.next_steps.push_back(value);
    };
    write_back(counts.step, next);
    write_back(counts.running, last_.moved_on);
    return scalars_.back();
}

Lacks StepTable::add(py::list params, py::dict state, const StepOptions& options, const std::string& owner,
                     int64_t group, py::dict grads, const py::object& names_of, const py::dict& firsts) {
    const RuleInfo& info = rule_info(options.rule);
    const bool stateless = info.states == 0 && options.weight == Weight::Plain;  // a dither counts steps
    Lacks lacks;
    options_.push_back(options);
    last_ = {};
    InOrder entries(state.ptr(), next_entry_);
    const bool any_grads = grads.size() != 0;
    for (int64_t i = 0; i < PyList_GET_SIZE(params.ptr()); ++i) {
        constexpr size_t ahead = 6;
        const Place place{owner, group, i, names_of};
        if (asked_ == hints_.size()) hints_.emplace_back();
        if (asked_ + ahead < hints_.size()) hints_[asked_ + ahead].prefetch();
        Hint& hint = hints_[asked_++];
        hint.forget();
        PyObject* param = PyList_GET_ITEM(params.ptr(), i);
        py::object held;
        if (any_grads) {
            PyObject* given = PyDict_GetItemWithError(grads.ptr(), py::int_(i).ptr());
            if (given == nullptr && PyErr_Occurred()) throw py::error_already_set();
            held = py::reinterpret_borrow<py::object>(given);
        }
        if (!held) held = queries_.grad.of(param);
        if (held.is_none()) {
            entries.pass(param);
            continue;
        }
        PyObject* grad = held.ptr();
        PyObject* entry = entries.find(param);

        const View p = view_of(param, place, "itself", "Only dense parameters can be stepped.");
        check_memory(param, p, place, "itself");
        hint.add_own(param, p);
        check_param(p, place);
        if (options.weight != Weight::Plain && p.storage() == Storage::Float32)
            place.fail("must be bfloat16 or float16 for master_bits or a dithered param_rounding, got " + p.describe() +
                       ". Put it into a group with master_bits=16 and param_rounding='nearest'.");
        const View g = view_of(grad, place, "has a gradient that",
                               "Use sparse=False in the embedding, or torch.optim.SparseAdam for it.");
        const bool lazy = queries_.is_lazy(grad, g);
        if (!lazy) {
            check_memory(grad, g, place, "has a gradient that");
            hint.add_own(grad, g);
            check_grad(p, g, place);
        }
        // All that is missing is noted at once, so that what is gathered next lacks nothing.
        bool complete = true;
        const auto lack = [&](std::vector<int64_t>& what) {
            what.push_back(i);
            complete = false;
        };
        if (!p.dense()) {
            check_apart(p, place);
            lack(lacks.gaps);  // its dense copy gets a gradient in the copy's layout
        } else if (lazy || !g.same_layout(p)) {
            lack(lacks.layout);
        }
        if (!stateless && (entry == nullptr || !PyDict_Check(entry) || PyDict_Size(entry) == 0)) {
            lack(lacks.state);
            continue;
        }

        if (!stateless) hint.add_dict(entry);
        Row row{};
        row.param = p.data;
        row.grad = g.data;
        row.size = p.size;
        row.rule = info.id;
        row.param_storage = p.storage();
        row.grad_storage = g.storage();
        row.options = &options_.back();
        row.rounding = options.rounding;
        row.direct = options.direct;
        row.weight = options.weight;
        const int64_t first = first_of(firsts, i);
        row.first_block = static_cast<uint32_t>(first / step_block);
        row.first_in_block = static_cast<uint32_t>(first % step_block);
        row.precision = Precision::Bits32;
        bool moved = false;
        Counts counts;
        counts.on_cpu = !(options.count_on_device && !p.on_cpu());
        if (!stateless) counts = read_state(entry, info, p, place, hint, row, moved);
        if (moved && p.dense()) lack(lacks.moved);
        if (counts.on_cpu && options.count_on_device && !p.on_cpu()) lack(lacks.step);
        if (!complete) continue;
        DeviceRows& rows = rows_on(p, !counts.on_cpu);
        if (counts.on_cpu) {
            row.scalars = &scalars_of_next(info, options, counts, rows);
        } else {
            row.device_step = counts.step;
            row.device_running = counts.running;
        }
        rows.rows.push_back(row);
        rows.places.push_back(static_cast<int64_t>(memory_.size()));
        params_.append(py::handle(param));
        memory_.push_back(p.size == 0 ? nullptr : p.data);
        grads_.push_back(std::move(held));
    }
    next_entry_ = entries.at();
    return lacks;
}

}  // namespace optim8
