// RMSprop (Tieleman and Hinton 2012, "Lecture 6.5", COURSERA: Neural Networks for Machine Learning; centered: Graves
// 2013, arXiv 1308.0850, equations 38 to 41), as torch.optim defines it: weight decay is added to the gradient, eps to
// the root, and the learning rate stays outside of the momentum.
#pragma once

#include "core/rules/rule.h"

OPTIM8_BEGIN

// Centered, a step divides by the root of square_avg - grad_avg^2. Where a gradient hardly varies that is a small
// difference of large numbers, of which 8 bits would leave only their own error.
template <bool momentum, bool centered>
struct RMSpropStates;
template <>
struct RMSpropStates<false, false> : RuleDefaults {
    static constexpr State states[] = {{"square_avg", Code::Positive, true}};
};
template <>
struct RMSpropStates<true, false> : RuleDefaults {
    static constexpr State states[] = {{"square_avg", Code::Positive, true}, {"momentum_buffer", Code::Signed}};
};
template <>
struct RMSpropStates<false, true> : RuleDefaults {
    static constexpr State states[] = {{"square_avg", Code::Positive, true, true},
                                       {"grad_avg", Code::Signed, false, true}};
};
template <>
struct RMSpropStates<true, true> : RuleDefaults {
    static constexpr State states[] = {{"square_avg", Code::Positive, true, true},
                                       {"momentum_buffer", Code::Signed},
                                       {"grad_avg", Code::Signed, false, true}};
};

template <bool with_momentum, bool with_centering>
struct RMSpropFamily : RMSpropStates<with_momentum, with_centering> {
    static constexpr const char* family = "rmsprop";
    static constexpr const char* torch_name = "RMSprop";
    static constexpr bool states_need_param = true;

    struct Hypers {
        double lr, alpha, eps, weight_decay, momentum, centered;
    };
    static constexpr Hyper<Hypers> hypers[] = {
        number("lr", &Hypers::lr, 1e-2),
        beta("alpha", -1, &Hypers::alpha, 0.99),
        number("eps", &Hypers::eps, 1e-8),
        number("weight_decay", &Hypers::weight_decay, 0.0),
        number("momentum", &Hypers::momentum, 0.0),
        flag("centered", &Hypers::centered, false),
    };
    static bool serves(const Hypers& h) {
        return (h.momentum > 0) == with_momentum && (h.centered != 0) == with_centering;
    }

    struct Scalars {
        float negative_lr, alpha, one_minus_alpha, eps, weight_decay, momentum;
    };
    OPTIM8_HD static Scalars derive(const Hypers& h, double) {
        return {rounded(-h.lr), rounded(h.alpha),        rounded(1 - h.alpha),
                rounded(h.eps), rounded(h.weight_decay), rounded(h.momentum)};
    }

    template <class F, int n>
    OPTIM8_HD static void update(F& p, F g, F (&state)[n], const Scalars& s) {
        F& v = state[0];
        // Not with weight_decay 0: 0 times an infinite parameter would be NaN.
        if (s.weight_decay != 0.0f) g = fma(F(s.weight_decay), p, g);
        v = fma(F(s.alpha), v, F(s.one_minus_alpha) * g * g);
        F variance = v;
        if constexpr (with_centering) {
            F& mean = state[n - 1];
            mean = fma(F(s.alpha), mean, F(s.one_minus_alpha) * g);
            variance = maximum(F(0.0f), fma(-mean, mean, v));  // a mean of squares, but for rounding
        }
        // Where g = v = 0 and eps = 0 the quotient must be 0, not NaN. What is NaN stays so: it is the second operand.
        const F denominator = maximum(F(smallest_normal), square_root(variance) + F(s.eps));
        F direction = g * reciprocal(denominator);
        if constexpr (with_momentum) direction = state[1] = fma(F(s.momentum), state[1], direction);
        p = fma(F(s.negative_lr), direction, p);
    }
};

struct RMSprop : RMSpropFamily<false, false> {};
struct RMSpropMomentum : RMSpropFamily<true, false> {};
struct RMSpropCentered : RMSpropFamily<false, true> {};
struct RMSpropCenteredMomentum : RMSpropFamily<true, true> {};

OPTIM8_END
