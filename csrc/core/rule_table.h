// What every rule says of itself, at run time: for the gathering of a step and for Python.
#pragma once

#include "core/row.h"

#include <cstddef>

namespace optim8 {

struct HyperInfo {
    const char* name;
    int part;
    double initial, least, below;
    HyperKind kind;
};

struct RuleInfo {
    const char* name;
    const char *torch_name, *functional_name;  // or null
    const char* family;                        // its own name where it has no variants
    const char* running;                       // or null
    float running_start;
    bool gives_direction;
    bool has_norms;
    RuleId id;
    int states, hypers;  // states that are kept
    State state[max_states];
    HyperInfo hyper[max_hypers];
    AnyScalars (*derive)(const StepOptions&, double step, float& running);
    bool (*serves)(const StepOptions&);
    const char* (*conflict)(const StepOptions&);
};

template <class Rule>
constexpr RuleInfo info_of(const char* name, RuleId id) {
    static_assert(state_count<Rule> >= 1 && state_count<Rule> <= max_states, "a row has room for so many states");
    static_assert(hyper_count<Rule> <= max_hypers, "options have room for so many hyper-parameters");
    RuleInfo info{};
    info.name = name;
    info.torch_name = Rule::torch_name;
    info.functional_name = Rule::functional_name;
    info.family = Rule::family != nullptr ? Rule::family : name;
    info.running = Rule::running;
    info.running_start = Rule::running_start;
    info.gives_direction = Rule::gives_direction;
    info.has_norms = Rule::has_norms;
    info.id = id;
    info.states = kept_count<Rule>;
    info.hypers = hyper_count<Rule>;
    for (int s = 0; s < info.states; ++s) info.state[s] = Rule::states[s];
    for (int i = 0; i < info.hypers; ++i) {
        const auto& h = Rule::hypers[i];
        info.hyper[i] = {h.name, h.part, h.initial, h.least, h.below, h.kind};
    }
    info.derive = [](const StepOptions& options, double step, float& running) {
        return any_of<Rule>(derive<Rule>(hypers_of<Rule>(options), step, running));
    };
    info.serves = [](const StepOptions& options) { return Rule::serves(hypers_of<Rule>(options).of_rule); };
    info.conflict = [](const StepOptions& options) { return Rule::conflict(hypers_of<Rule>(options).of_rule); };
    return info;
}

inline constexpr RuleInfo rule_table[] = {
#define OPTIM8_RULE_INFO(name, type) info_of<type>(#name, RuleId::name),
    OPTIM8_RULES(OPTIM8_RULE_INFO)
#undef OPTIM8_RULE_INFO
};
inline const RuleInfo& rule_info(RuleId id) { return rule_table[static_cast<size_t>(id)]; }

}  // namespace optim8
