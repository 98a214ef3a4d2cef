// Stochastic gradient descent with momentum (Sutskever et al. 2013, "On the importance of initialization and momentum
// in deep learning", section 2), as torch.optim defines it: weight decay is added to the gradient, and the learning
// rate stays outside of the momentum, so that a change of it acts at once.
#pragma once

#include "core/rules/rule.h"

OPTIM8_BEGIN

struct SGDOptions : RuleDefaults {
    static constexpr const char* torch_name = "SGD";
    static constexpr State states[] = {{"momentum_buffer", Code::Signed}};
    static constexpr bool states_need_param = true;

    struct Hypers {
        double lr, momentum, dampening, weight_decay, nesterov;
    };
    static constexpr Hyper<Hypers> hypers[] = {
        number("lr", &Hypers::lr, 1e-3),
        number("momentum", &Hypers::momentum, 0.0),
        number("dampening", &Hypers::dampening, 0.0),
        number("weight_decay", &Hypers::weight_decay, 0.0),
        flag("nesterov", &Hypers::nesterov, false),
    };
    static const char* conflict(const Hypers& h) {
        return h.nesterov != 0 && !(h.momentum > 0 && h.dampening == 0)
                   ? "nesterov=True needs a momentum above 0 and dampening=0."
                   : nullptr;
    }

    struct Scalars {
        float negative_lr, momentum, fresh, weight_decay, nesterov;
    };
    OPTIM8_HD static Scalars derive(const Hypers& h, double step) {
        // The first gradient goes into the momentum undampened.
        return {rounded(-h.lr), rounded(h.momentum), rounded(step <= 1 ? 1 : 1 - h.dampening), rounded(h.weight_decay),
                rounded(h.nesterov)};
    }
    template <class F>
    OPTIM8_HD static F penalized(F g, F p, const Scalars& s) {
        // Not with weight_decay 0: 0 times an infinite parameter would be NaN.
        return s.weight_decay != 0.0f ? fma(F(s.weight_decay), p, g) : g;
    }
    // A step along a gradient, with momentum and without.
    template <class F>
    OPTIM8_HD static void move(F& p, F g, F& m, const Scalars& s) {
        m = fma(F(s.momentum), m, F(s.fresh) * g);
        const F direction = s.nesterov != 0.0f ? fma(F(s.momentum), m, g) : m;
        p = fma(F(s.negative_lr), direction, p);
    }
    template <class F>
    OPTIM8_HD static void move(F& p, F g, const Scalars& s) {
        p = fma(F(s.negative_lr), g, p);
    }
};

struct SGD : SGDOptions {
    static bool serves(const Hypers& h) { return h.momentum != 0; }

    template <class F, int n>
    OPTIM8_HD static void update(F& p, F g, F (&state)[n], const Scalars& s) {
        move(p, penalized(g, p, s), state[0], s);
    }
};

// Without momentum.
struct PlainSGD : SGDOptions {
    static constexpr const char* family = "sgd";
    static constexpr bool stateless = true;

    template <class F, int n>
    OPTIM8_HD static void update(F& p, F g, F (&)[n], const Scalars& s) {
        move(p, penalized(g, p, s), s);
    }
};

OPTIM8_END
