// Adadelta (Zeiler 2012, arXiv 1212.5701, algorithm 1), as torch.optim defines it: with a learning rate, and weight
// decay added to the gradient. eps is inside of both roots.
#pragma once

#include "core/rules/rule.h"

OPTIM8_BEGIN

struct Adadelta : RuleDefaults {
    static constexpr const char* torch_name = "Adadelta";
    static constexpr State states[] = {{"square_avg", Code::Positive, true}, {"acc_delta", Code::Positive, true}};
    static constexpr bool states_need_param = true;

    struct Hypers {
        double lr, rho, eps, weight_decay;
    };
    static constexpr Hyper<Hypers> hypers[] = {
        number("lr", &Hypers::lr, 1.0),
        beta("rho", -1, &Hypers::rho, 0.9),
        number("eps", &Hypers::eps, 1e-6),
        number("weight_decay", &Hypers::weight_decay, 0.0),
    };

    struct Scalars {
        float negative_lr, rho, one_minus_rho, eps, weight_decay;
    };
    OPTIM8_HD static Scalars derive(const Hypers& h, double) {
        return {rounded(-h.lr), rounded(h.rho), rounded(1 - h.rho), rounded(h.eps), rounded(h.weight_decay)};
    }

    template <class F, int n>
    OPTIM8_HD static void update(F& p, F g, F (&state)[n], const Scalars& s) {
        F& v = state[0];
        F& u = state[1];
        // Not with weight_decay 0: 0 times an infinite parameter would be NaN.
        if (s.weight_decay != 0.0f) g = fma(F(s.weight_decay), p, g);
        v = fma(F(s.rho), v, F(s.one_minus_rho) * g * g);
        // Where g = v = 0 and eps = 0 the quotient must be 0, not NaN.
        const F denominator = maximum(F(smallest_normal), square_root(v + F(s.eps)));
        const F delta = square_root(u + F(s.eps)) * reciprocal(denominator) * g;
        u = fma(F(s.rho), u, F(s.one_minus_rho) * delta * delta);
        p = fma(F(s.negative_lr), delta, p);
    }
};

OPTIM8_END
