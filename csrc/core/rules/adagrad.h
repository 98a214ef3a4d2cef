// Adagrad (Duchi, Hazan and Singer 2011, "Adaptive Subgradient Methods for Online Learning and Stochastic
// Optimization", JMLR 12, with diagonal matrices), as torch.optim defines it: weight decay is added to the
// gradient, eps to the root, and the learning rate falls as 1 / (1 + lr_decay * (t - 1)).
#pragma once

#include "core/rules/rule.h"

OPTIM8_BEGIN

struct Adagrad : RuleDefaults {
    static constexpr const char* torch_name = "Adagrad";
    static constexpr State states[] = {{"sum", Code::Positive, true, false, "initial_accumulator_value"}};
    static constexpr bool states_need_param = true;

    struct Hypers {
        double lr, lr_decay, weight_decay, initial_accumulator_value, eps;
    };
    static constexpr Hyper<Hypers> hypers[] = {
        number("lr", &Hypers::lr, 1e-2),
        number("lr_decay", &Hypers::lr_decay, 0.0),
        number("weight_decay", &Hypers::weight_decay, 0.0),
        number("initial_accumulator_value", &Hypers::initial_accumulator_value, 0.0),
        number("eps", &Hypers::eps, 1e-10),
    };

    struct Scalars {
        float negative_step_size, eps, weight_decay;
    };
    OPTIM8_HD static Scalars derive(const Hypers& h, double step) {
        return {rounded(-h.lr / (1 + (step - 1) * h.lr_decay)), rounded(h.eps), rounded(h.weight_decay)};
    }

    template <class F, int n>
    OPTIM8_HD static void update(F& p, F g, F (&state)[n], const Scalars& s) {
        F& sum = state[0];
        // Not with weight_decay 0: 0 times an infinite parameter would be NaN.
        if (s.weight_decay != 0.0f) g = fma(F(s.weight_decay), p, g);
        sum = fma(g, g, sum);
        // Where g = sum = 0 and eps = 0 the quotient must be 0, not NaN.
        const F denominator = maximum(F(smallest_normal), square_root(sum) + F(s.eps));
        p = fma(F(s.negative_step_size), g * reciprocal(denominator), p);
    }
};

OPTIM8_END
