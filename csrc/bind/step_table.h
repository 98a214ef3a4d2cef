// All tensors of one step, gathered and checked before anything is changed.
//
// Nothing about a tensor is believed from one step to the next: users replace gradients, and offloading code replaces
// state. So every object is asked again every step. Asking is cheap; waiting for memory is not: a step streams
// through all caches, so the next one finds thousands of small objects in main memory, one after the other. The
// table therefore remembers where the objects of the step before lay and prefetches those lines some parameters
// ahead. A prefetch of a stale address is harmless, so this needs no check.
#pragma once

#include "core/rule_table.h"
#include "core/span.h"
#include "tensors/attributes.h"
#include "tensors/view.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <deque>
#include <optional>
#include <utility>
#include <vector>

namespace optim8 {

// What a step lacks before it can run: indices of parameters. All that one parameter lacks is noted at once.
struct Lacks {
    std::vector<int64_t> gaps;    // the parameter has gaps between its elements
    std::vector<int64_t> state;   // there is a gradient but no state yet
    std::vector<int64_t> layout;  // the gradient has other strides than the parameter
    std::vector<int64_t> moved;   // the state has other strides than the parameter has now
    std::vector<int64_t> step;    // the count of steps must move to the parameter's device
};

// Where the objects of one parameter lay when they were last asked. Nobody reads through these addresses.
class Hint {
  public:
    void forget() { count_ = 0; }
    // A tensor: its Python object, and the torch object around the shape that it lent.
    void add(PyObject* object, const View& view);
    // The same for a tensor whose memory is not cut from an arena.
    void add_own(PyObject* object, const View& view);
    // A dict: its header and its table of keys.
    void add_dict(PyObject* object);
    void prefetch() const;

  private:
    void add(const void* line, int lines);
    struct Range {
        const char* begin;
        int lines;
    };
    static constexpr int most = 2 * (4 + 3 * max_states) + 4;
    Range ranges_[most];
    int count_ = 0;
};

// The rows of one device, and the counts of their steps (and scalars `running`) if the host counts; if the device
// counts, each row has its own.
struct DeviceRows {
    bool on_cpu;
    int32_t device;
    bool count_on_device;
    std::vector<Row> rows;
    std::vector<int64_t> places;  // of the rows among all rows of the table
    std::vector<float*> steps;
    std::vector<float> next_steps;

    void count();
    bool has_norms() const;
    int64_t blocks() const;
    // Gives each row its two of `sums`.
    void take_sums(double* sums);
    // Fills `sums`, of rows on the CPU.
    void measure(int threads) const;
};

// What is asked of tensors beyond their views. Types may be patched between two steps, so it lasts for one.
struct TensorQueries {
    Attribute grad;
    Question is_neg, is_zero;

    TensorQueries();
    // Whether a tensor's memory does not hold its values: lazily negated, or zeros without memory.
    bool is_lazy(PyObject* tensor, const View& view);
};

struct Place;

// The rule of this name. Throws ValueError where there is none.
const RuleInfo& rule_of(const std::string& name);

class StepTable {
  public:
    // Starts another step: no rows, no tensors held, no host memory, but the hints of the last one.
    void clear();

    // State in this memory of the host may be stepped by kernels of other devices, which then use it by its address:
    // CUDA gives pinned memory one address for the host and all devices.
    void allow_host(std::vector<Span> spans) { host_ = std::move(spans); }

    // Gathers one parameter group. `params` is a list of tensors, `state` maps them to their states, `grads` maps
    // indices to gradients that are taken instead of what a tensor has as `.grad`, `names_of` is the list of the
    // parameters' names or None, `firsts` maps indices of parts of larger parameters to where in these they begin, in
    // values. Throws ValueError that names `owner`, group, index and name.
    Lacks add(py::list params, py::dict state, const StepOptions& options, const std::string& owner, int64_t group,
              py::dict grads, const py::object& names_of, const py::dict& firsts);

    // Finds two of `params` whose values begin at the same address: threads would step them at once. It does not
    // search where the addresses are those of the last step that had no such pair.
    std::optional<std::pair<int64_t, int64_t>> same_memory();

    // Steps every row on the CPU and counts the step. `meanwhile` is called once, with the GIL, by this thread while
    // the other threads step already; if it throws, that is thrown on when all is stepped and counted.
    void run_cpu(int threads, const py::function& meanwhile);

    // The rows of the CPU, or null where there are none.
    DeviceRows* on_cpu();

    // The rows of the other devices, for the module of their kernels.
    std::vector<DeviceRows*> elsewhere();

    int64_t size() const { return static_cast<int64_t>(params_.size()); }
    // The parameters of the rows, in order.
    const py::list& params() const { return params_; }

  private:
    DeviceRows& rows_on(const View& param, bool count_on_device);
    // What a parameter counts: its steps, and the scalar `running` of its rule. Null where it has none.
    struct Counts {
        bool on_cpu = true;
        float *step = nullptr, *running = nullptr;
    };
    // Fills a row's addresses from a parameter's state. `moved`: whether it lies otherwise than the parameter.
    Counts read_state(PyObject* entry, const RuleInfo& rule, const View& param, const Place& place, Hint& hint,
                      Row& row, bool& moved);
    void read_param_low(InOrder& values_of, const View& param, const Place& place, Hint& hint, Row& row,
                        bool& moved) const;
    const AnyScalars& scalars_of_next(const RuleInfo& rule, const StepOptions& options, const Counts& counts,
                                      DeviceRows& rows);
    // Whether kernels that step `param` may use the memory of `state`, which is taken to be without gaps.
    bool reaches(const View& param, const View& state) const;

    std::deque<DeviceRows> devices_;   // the CPU first
    std::deque<StepOptions> options_;  // by group; rows point to them
    std::deque<AnyScalars> scalars_;   // rows point to them
    struct {
        bool valid;
        float step, running, moved_on;
    } last_ = {};  // what the last of them was derived from, and the scalar `running` behind it
    std::vector<Span> host_;
    py::list params_;
    std::vector<const void*> memory_, apart_;  // where the values of params_ begin; the same, known to differ
    std::vector<py::object> grads_;  // held, so that another thread that drops a gradient does not free it in a step
    std::vector<Hint> hints_;        // by order of asking
    size_t asked_ = 0;
    Py_ssize_t next_entry_ = 0;  // where in the optimizer's state the next parameter's entry is expected
    TensorQueries queries_;
};

}  // namespace optim8
