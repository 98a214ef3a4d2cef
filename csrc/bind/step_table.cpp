// What a table of rows keeps from one step to the next, and what it tells of its rows.
#include "bind/step_table.h"

#include "core/codec.h"
#include "core/norms.h"

#include <algorithm>

namespace optim8 {

void Hint::add(const void* line, int lines) {
    if (count_ < most) ranges_[count_++] = Range{static_cast<const char*>(line), lines};
}

void Hint::add(PyObject* object, const View& view) {
    add(object, 1);
    // Shapes of up to five dimensions lie within torch's tensor object; storage before, dtype and strides behind.
    if (view.shape != nullptr && view.owned.empty()) add(reinterpret_cast<const char*>(view.shape) - 64, 4);
}

void Hint::add_own(PyObject* object, const View& view) {
    add(object, view);
    // A small storage was often allocated along with the object that describes it.
    constexpr int64_t small = 64 * 1024;
    if (view.size > 0 && view.bytes() <= small) add(static_cast<const char*>(view.data) - 384, 6);
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

bool DeviceRows::has_norms() const {
    return std::any_of(rows.begin(), rows.end(), [](const Row& row) { return rule_info(row.rule).has_norms; });
}

int64_t DeviceRows::blocks() const {
    int64_t all = 0;
    for (const Row& row : rows) all += blocks_of(row.size, step_block);
    return all;
}

void DeviceRows::take_sums(double* sums) {
    for (size_t r = 0; r < rows.size(); ++r) rows[r].sums = sums + norms * r;
}

DeviceRows& StepTable::rows_on(const View& param, bool count_on_device) {
    for (DeviceRows& known : devices_)
        if (known.on_cpu == param.on_cpu() && known.device == param.device && known.count_on_device == count_on_device)
            return known;
    devices_.push_back(DeviceRows{param.on_cpu(), param.device, count_on_device, {}, {}, {}, {}});
    return devices_.back();
}

bool StepTable::reaches(const View& param, const View& state) const {
    if (state.same_device(param)) return true;
    if (!state.on_cpu()) return false;
    const auto begin = reinterpret_cast<uintptr_t>(state.data), end = begin + static_cast<uintptr_t>(state.bytes());
    return std::any_of(host_.begin(), host_.end(), [&](const Span& span) {
        return state.size == 0 || (span.first <= begin && end <= span.second);
    });
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
        known.places.clear();
        known.steps.clear();
        known.next_steps.clear();
    }
    options_.clear();
    scalars_.clear();
    host_.clear();
    params_ = py::list();
    memory_.clear();
    grads_.clear();
    asked_ = 0;
    next_entry_ = 0;
    queries_ = TensorQueries();
}

std::optional<std::pair<int64_t, int64_t>> StepTable::same_memory() {
    if (memory_ == apart_) return std::nullopt;
    std::vector<std::pair<const void*, int64_t>> places;
    for (size_t i = 0; i < memory_.size(); ++i)
        if (memory_[i] != nullptr) places.emplace_back(memory_[i], static_cast<int64_t>(i));
    std::sort(places.begin(), places.end());
    for (size_t i = 1; i < places.size(); ++i)
        if (places[i].first == places[i - 1].first) return std::make_pair(places[i - 1].second, places[i].second);
    apart_ = memory_;
    return std::nullopt;
}

}  // namespace optim8
