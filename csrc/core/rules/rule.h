// What a rule says of itself beside its formula: the names, order and codes of its states, and its hyper-parameters
// with their defaults and bounds. core/rules/all.h collects this, and Python reads it from there.
//
// A rule is a struct that inherits RuleDefaults, with
//   states[]   State: from 1 to max_states
//   Hypers     a struct of doubles: the hyper-parameters as the user set them; `lr` is one of them
//   hypers[]   Hyper<Hypers>: for each of these its name, default and bounds
//   Scalars    what `update` needs of them, in float32
//   derive     (Hypers, step, from 1) -> Scalars: once a step, in double; each scalar is rounded once
//   states_need_param   whether the new states depend on the parameter
//   update     (parameter, gradient, states, Scalars): over any number type (core/number.h), in place
#pragma once

#include "core/codec.h"
#include "core/number.h"

#include <limits>

OPTIM8_BEGIN

constexpr int max_states = 3, max_hypers = 10;

// name: the key of its float32 values in a parameter's state. A state starts as 0.
// root: codes stand for its square root, as is best for a second moment: a step divides by the root, and the range of
// the code in gradients is squared.
struct State {
    const char* name;
    Code code;
    bool root = false;
};

enum class HyperKind { Number, Flag };

template <class Hypers>
using Member = double Hypers::*;

// A hyper-parameter: an option of a parameter group, at least `least` and below `below`; or one number of a pair.
// part: its place in the pair; -1 where it is an option of its own.
template <class Hypers>
struct Hyper {
    const char* name;
    int part;
    Member<Hypers> member;
    double initial;
    HyperKind kind = HyperKind::Number;
    double least = 0, below = std::numeric_limits<double>::infinity();
};

template <class H>
constexpr Hyper<H> number(const char* name, Member<H> member, double initial) {
    return {name, -1, member, initial};
}
// A rate of decay, in [0, 1).
template <class H>
constexpr Hyper<H> beta(const char* name, int part, Member<H> member, double initial) {
    return {name, part, member, initial, HyperKind::Number, 0, 1};
}
template <class H>
constexpr Hyper<H> flag(const char* name, Member<H> member, bool initial) {
    return {name, -1, member, initial ? 1.0 : 0.0, HyperKind::Flag, 0, 2};
}

// What a rule may say beside that, but need not.
struct RuleDefaults {
    static constexpr const char* torch_name = nullptr;       // the optimizer of torch.optim with the same rule
    static constexpr const char* functional_name = nullptr;  // what optimizer_update_* of the functional API call it
    // Says what is wrong with values that are each within their bounds, as "a needs b"; null: nothing.
    template <class Hypers>
    static const char* conflict(const Hypers&) {
        return nullptr;
    }
};

template <class Rule>
constexpr int state_count = static_cast<int>(sizeof(Rule::states) / sizeof(State));
template <class Rule>
constexpr int hyper_count = static_cast<int>(sizeof(Rule::hypers) / sizeof(Rule::hypers[0]));
template <class Rule, int s>
constexpr Code code_of = Rule::states[s].code;
template <class Rule>
constexpr bool has_roots() {
    for (const State& state : Rule::states)
        if (state.root) return true;
    return false;
}

// base^exponent for a whole exponent, by squaring. The order of the float64 multiplications is fixed, so host and
// device agree; their libraries' pow does not promise that.
OPTIM8_HD double power(double base, double exponent) {
    constexpr double most = 9007199254740992.0;  // 2^53
    double result = 1;
    for (uint64_t left = exponent > 0 ? static_cast<uint64_t>(exponent < most ? exponent : most) : 0; left != 0;
         left >>= 1, base *= base)
        if (left & 1) result *= base;
    return result;
}

OPTIM8_HD float rounded(double x) { return static_cast<float>(x); }

OPTIM8_END
