// Adamax (Kingma and Ba 2015, arXiv 1412.6980, algorithm 2), as torch.optim defines it: weight decay is added to the
// gradient, and eps to its magnitude, so that what a step divides by is at least eps.
#pragma once

#include "core/rules/rule.h"

OPTIM8_BEGIN

struct Adamax : RuleDefaults {
    static constexpr const char* torch_name = "Adamax";
    static constexpr State states[] = {{"exp_avg", Code::Signed}, {"exp_inf", Code::Positive}};
    static constexpr bool states_need_param = true;

    struct Hypers {
        double lr, beta1, beta2, eps, weight_decay;
    };
    static constexpr Hyper<Hypers> hypers[] = {
        number("lr", &Hypers::lr, 2e-3),
        beta("betas", 0, &Hypers::beta1, 0.9),
        beta("betas", 1, &Hypers::beta2, 0.999),
        number("eps", &Hypers::eps, 1e-8),
        number("weight_decay", &Hypers::weight_decay, 0.0),
    };

    struct Scalars {
        float beta1, one_minus_beta1, beta2, eps, weight_decay;
        float negative_step_size;  // -lr / (1 - beta1^t)
    };
    OPTIM8_HD static Scalars derive(const Hypers& h, double step) {
        return {rounded(h.beta1), rounded(1 - h.beta1),    rounded(h.beta2),
                rounded(h.eps),   rounded(h.weight_decay), rounded(-h.lr / (1 - power(h.beta1, step)))};
    }

    template <class F, int n>
    OPTIM8_HD static void update(F& p, F g, F (&state)[n], const Scalars& s) {
        F& m = state[0];
        F& u = state[1];
        // Not with weight_decay 0: 0 times an infinite parameter would be NaN.
        if (s.weight_decay != 0.0f) g = fma(F(s.weight_decay), p, g);
        m = fma(F(s.beta1), m, F(s.one_minus_beta1) * g);
        u = maximum(F(s.beta2) * u, absolute(g) + F(s.eps));
        // Where m = u = 0 and eps = 0 the quotient must be 0, not NaN.
        p = fma(F(s.negative_step_size), m * reciprocal(maximum(F(smallest_normal), u)), p);
    }
};

OPTIM8_END
