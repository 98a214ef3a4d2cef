// What a rule says of itself beside its formula: the names, order and codes of its states, and its hyper-parameters
// with their defaults and bounds. core/rules/all.h collects this, and Python reads it from there.
//
// A rule is a struct that inherits RuleDefaults, with
//   states[]   State: from 1 to max_states
//   Hypers     a struct of doubles: the hyper-parameters as the user set them; `lr` is one of them
//   hypers[]   Hyper<Hypers>: for each of these its name, default and bounds
//   Scalars    what `update` needs of them, in float32
//   derive     (Hypers, step, from 1) -> Scalars: once a step, in double; each scalar is rounded once. Where `running`
//              is set also (.., float&): the parameter's own scalar, which it brings forward by a step
//   states_need_param   whether the new states depend on the parameter
//   update     (parameter, gradient, states, Scalars): over any number type (core/number.h), in place
#pragma once

#include "core/codec.h"
#include "core/number.h"

#include <limits>

OPTIM8_BEGIN

constexpr int max_states = 3, max_hypers = 12;

// name: the key of its float32 values in a parameter's state.
// root: codes stand for its square root, as is best for a second moment: a step divides by the root, and the range of
// the code in gradients is squared.
// wide: it has 16 bits where the other states have 8, since 8 cannot follow it.
// initial: the hyper-parameter that each of its values starts as; null: they start as 0.
struct State {
    const char* name;
    Code code;
    bool root = false, wide = false;
    const char* initial = nullptr;
};

enum class HyperKind : uint8_t { Number, Flag, Optional };

template <class Hypers>
using Member = double Hypers::*;

// A hyper-parameter: an option of a parameter group, at least `least` and below `below`; or one number of a pair
// or triple.
// part: its place in the pair, or the triple; -1 where it is an option of its own.
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
// A positive number or None, which is the default and counts as 0.
template <class H>
constexpr Hyper<H> optional(const char* name, Member<H> member) {
    return {name, -1, member, 0, HyperKind::Optional};
}

// What a rule may say beside that, but need not.
struct RuleDefaults {
    static constexpr const char* torch_name = nullptr;       // the optimizer of torch.optim with the same rule
    static constexpr const char* functional_name = nullptr;  // what optimizer_update_* of the functional API call it
    // Variants of one rule keep different states, as its options ask. They have the same Hypers and the first one's
    // name as `family`, and the first that serves the options of a group steps it. Null: the rule has no variants.
    static constexpr const char* family = nullptr;
    template <class Hypers>
    static bool serves(const Hypers&) {
        return true;
    }
    // `update` leaves in the place of the parameter a direction, which Python orthogonalizes and takes the parameter
    // along.
    static constexpr bool gives_direction = false;
    // Whether CUDA has a second kernel for much work (cuda/step_columns.h), which takes long to compile. It needs one
    // or two states of 8 bits, and no norms.
    static constexpr bool in_columns = false;
    static constexpr bool stateless = false;  // nothing is kept, and states[] holds one that is always 0
    // The key of a scalar that each parameter has beside its count of steps, and what it starts as.
    static constexpr const char* running = nullptr;
    static constexpr float running_start = 1;
    // Whether a step depends on two norms of the whole tensor. Then the rule has also
    //   measure   (parameter, gradient, states, Scalars, F (&of)[2]): of an element the numbers whose norms they are
    //   trust     (Scalars, norm, norm) -> Scalars: those of one tensor
    static constexpr bool has_norms = false;
    // Says what is wrong with values that are each within their bounds, as "a needs b"; null: nothing.
    template <class Hypers>
    static const char* conflict(const Hypers&) {
        return nullptr;
    }
};

template <class Rule>
constexpr int state_count = static_cast<int>(sizeof(Rule::states) / sizeof(State));
// Those that are kept.
template <class Rule>
constexpr int kept_count = Rule::stateless ? 0 : state_count<Rule>;
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

// e^x and the natural logarithm of a positive number, to a few units in the last place of float64. Only operations that
// IEEE 754 defines, for the same reason.
OPTIM8_HD double exponential(double x) {
    constexpr double least = -745, most = 709;
    x = x < least ? least : x > most ? most : x;
    // The 1024th part is so small that these terms of the series give all bits.
    constexpr int halvings = 10, terms = 18;
    const double part = x * (1.0 / (1 << halvings));
    double less_one = 0;  // e^part - 1: the squares lose fewer bits of it
    for (int k = terms; k > 0; --k) less_one = fma(less_one, part, part) / k;
    for (int i = 0; i < halvings; ++i) less_one = fma(less_one, less_one, 2 * less_one);
    return 1 + less_one;
}
OPTIM8_HD double logarithm(double x) {
    constexpr double ln_2 = 0.69314718055994530942;
    int halvings = 0;
    for (; x > 1.5; ++halvings) x *= 0.5;
    for (; x < 0.75; --halvings) x *= 2;
    // 2 artanh(r), r at most 1/5
    const double r = (x - 1) / (x + 1), square = r * r;
    double sum = 0;
    for (int k = 25; k > 0; k -= 2) sum = fma(sum, square, 1.0 / k);
    return fma(static_cast<double>(halvings), ln_2, 2 * r * sum);
}

OPTIM8_HD float rounded(double x) { return static_cast<float>(x); }

OPTIM8_END
