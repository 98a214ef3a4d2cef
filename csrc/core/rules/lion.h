// Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2): a step of fixed size along the sign of an interpolation of
// momentum and gradient, with decoupled weight decay.
#pragma once

#include "core/rules/rule.h"

OPTIM8_BEGIN

struct Lion : RuleDefaults {
    static constexpr State states[] = {{"exp_avg", Code::Signed}};
    static constexpr bool in_columns = true;
    static constexpr const char* functional_name = "lion";
    static constexpr bool states_need_param = false;

    struct Hypers {
        double lr, beta1, beta2, weight_decay;
    };
    static constexpr Hyper<Hypers> hypers[] = {
        number("lr", &Hypers::lr, 1e-4),
        beta("betas", 0, &Hypers::beta1, 0.9),
        beta("betas", 1, &Hypers::beta2, 0.99),
        number("weight_decay", &Hypers::weight_decay, 0.0),
    };

    struct Scalars {
        float lr, beta1, one_minus_beta1, beta2, one_minus_beta2;
        float decay;  // 1 - lr * weight_decay
    };
    OPTIM8_HD static Scalars derive(const Hypers& h, double) {
        return {rounded(h.lr),    rounded(h.beta1),     rounded(1 - h.beta1),
                rounded(h.beta2), rounded(1 - h.beta2), rounded(1 - h.lr * h.weight_decay)};
    }

    template <class F, int n>
    OPTIM8_HD static void update(F& p, F g, F (&state)[n], const Scalars& s) {
        F& m = state[0];
        const F direction = sign(fma(F(s.beta1), m, F(s.one_minus_beta1) * g));
        p = fma(F(-s.lr), direction, p * F(s.decay));
        m = fma(F(s.beta2), m, F(s.one_minus_beta2) * g);
    }
};

OPTIM8_END
