// The scalars of a step, whatever the rule: as the user set them, and as a kernel of one rule takes them.
#pragma once

#include "core/dither.h"
#include "core/rules/all.h"
#include "core/weight.h"

#include <cstring>

namespace optim8 {

// The options of a parameter group and what a step adds to them.
struct StepOptions {
    RuleId rule{};
    double value[max_hypers] = {};  // of the rule's hyper-parameters, in its order
    bool maximize = false;
    double gradient_scale = 1;  // every gradient is multiplied by it (1 / loss scale)
    // The CUDA device counts the steps, so that it may also decide whether a step is made at all.
    bool count_on_device = false;
    const float* device_lr = nullptr;  // where lr stands in device memory, instead of its value; needs count_on_device
    Rounding rounding = Rounding::Nearest;
    Weight weight = Weight::Plain;  // of parameters of 16 bits
    bool direct = false;  // codes stand for the states themselves, as in other libraries, also where they have roots
};

}  // namespace optim8

OPTIM8_BEGIN

// The same for one rule, with names.
template <class Rule>
struct StepHypers {
    typename Rule::Hypers of_rule;
    bool maximize;
    double gradient_scale;
    const float* device_lr;
};

template <class Rule>
StepHypers<Rule> hypers_of(const StepOptions& options) {
    static_assert(hyper_count<Rule> <= max_hypers);
    static_assert(sizeof(typename Rule::Hypers) == hyper_count<Rule> * sizeof(double), "each has a row in `hypers`");
    StepHypers<Rule> hypers{{}, options.maximize, options.gradient_scale, options.device_lr};
    for (int i = 0; i < hyper_count<Rule>; ++i) hypers.of_rule.*(Rule::hypers[i].member) = options.value[i];
    return hypers;
}

// What a kernel takes.
template <class Rule>
struct StepScalars {
    typename Rule::Scalars of_rule;
    float gradient_factor;  // gradient_scale, negated to maximize
    uint32_t dither_time;
};

// `running`: the parameter's own scalar, where the rule has one; moves on by a step.
template <class Rule>
OPTIM8_HD StepScalars<Rule> derive(const StepHypers<Rule>& hypers, double step, float& running) {
    StepScalars<Rule> scalars{};
    if constexpr (Rule::running != nullptr)
        scalars.of_rule = Rule::derive(hypers.of_rule, step, running);
    else
        scalars.of_rule = Rule::derive(hypers.of_rule, step);
    scalars.gradient_factor = static_cast<float>(hypers.maximize ? -hypers.gradient_scale : hypers.gradient_scale);
    scalars.dither_time = dither_time(step);
    return scalars;
}

// Room for the scalars of any rule.
constexpr int max_scalars = 16;
struct AnyScalars {
    float value[max_scalars];
};
template <class Rule>
StepScalars<Rule> scalars_of(const AnyScalars& any) {
    static_assert(sizeof(StepScalars<Rule>) <= sizeof(AnyScalars), "raise max_scalars");
    StepScalars<Rule> scalars;
    std::memcpy(&scalars, &any, sizeof scalars);
    return scalars;
}
template <class Rule>
AnyScalars any_of(const StepScalars<Rule>& scalars) {
    AnyScalars any{};
    std::memcpy(&any, &scalars, sizeof scalars);
    return any;
}

OPTIM8_END
