// What every rule says of itself, at run time: for the gathering of a step and for Python.
#pragma once

#include "core/row.h"

#include <cstddef>

namespace optim8 {

struct HyperInfo {
    const char* name;
    int part;
    double initial, least, below;
    bool is_flag;
};

struct RuleInfo {
    const char* name;
    const char *torch_name, *functional_name;  // or null
    RuleId id;
    int states, hypers;
    State state[max_states];
    HyperInfo hyper[max_hypers];
    AnyScalars (*derive)(const StepOptions&, double step);
    const char* (*conflict)(const StepOptions&);
};

template <class Rule>
constexpr RuleInfo info_of(const char* name, RuleId id) {
    static_assert(state_count<Rule> >= 1 && state_count<Rule> <= max_states, "a row has room for so many states");
    static_assert(hyper_count<Rule> <= max_hypers, "options have room for so many hyper-parameters");
    RuleInfo info{name,    Rule::torch_name, Rule::functional_name, id, state_count<Rule>, hyper_count<Rule>, {}, {},
                  nullptr, nullptr};
    for (int s = 0; s < info.states; ++s) info.state[s] = Rule::states[s];
    for (int i = 0; i < info.hypers; ++i) {
        const auto& h = Rule::hypers[i];
        info.hyper[i] = {h.name, h.part, h.initial, h.least, h.below, h.kind == HyperKind::Flag};
    }
    info.derive = [](const StepOptions& options, double step) {
        return any_of<Rule>(derive<Rule>(hypers_of<Rule>(options), step));
    };
    info.conflict = [](const StepOptions& options) { return Rule::conflict(hypers_of<Rule>(options).of_rule); };
    return info;
}

inline constexpr RuleInfo rule_table[] = {
#define OPTIM8_RULE_INFO(name, type) info_of<type>(#name, RuleId::name),
    OPTIM8_RULES(OPTIM8_RULE_INFO)
#undef OPTIM8_RULE_INFO
};

}  // namespace optim8
