// RAdam (Liu et al. 2020, arXiv 1908.03265, algorithm 2), as torch.optim defines it: the variance is taken to be
// tractable above a length of 5 (the paper: 4), and weight decay is added to the gradient or taken off the
// parameter.
#pragma once

#include "core/rules/rule.h"

OPTIM8_BEGIN

struct RAdam : RuleDefaults {
    static constexpr const char* torch_name = "RAdam";
    static constexpr State states[] = {{"exp_avg", Code::Signed}, {"exp_avg_sq", Code::Positive, true}};
    static constexpr bool states_need_param = true;

    struct Hypers {
        double lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay;
    };
    static constexpr Hyper<Hypers> hypers[] = {
        number("lr", &Hypers::lr, 1e-3),
        beta("betas", 0, &Hypers::beta1, 0.9),
        beta("betas", 1, &Hypers::beta2, 0.999),
        number("eps", &Hypers::eps, 1e-8),
        number("weight_decay", &Hypers::weight_decay, 0.0),
        flag("decoupled_weight_decay", &Hypers::decoupled_weight_decay, false),
    };

    struct Scalars {
        float beta1, one_minus_beta1, beta2, one_minus_beta2;
        float weight_decay, decay;  // added to the gradient; what is left of the parameter
        float of_root, offset;      // 1 and eps: the step divides by sqrt(v) + eps; 0 and 1: by 1, not yet rectified
        float negative_step_size;   // -lr / (1 - beta1^t), and where rectified * r_t * sqrt(1 - beta2^t)
    };
    OPTIM8_HD static Scalars derive(const Hypers& h, double step) {
        const bool decoupled = h.decoupled_weight_decay != 0;
        const double power2 = power(h.beta2, step), correction2 = 1 - power2;
        // The length of the simple average that the exponential one is like, after many steps and now.
        const double most = 2 / (1 - h.beta2) - 1, length = most - 2 * step * power2 / correction2;
        const bool rectified = length > 5;
        double factor = 1;
        if (rectified)
            factor = sqrt((length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length)) * sqrt(correction2);
        return {rounded(h.beta1),
                rounded(1 - h.beta1),
                rounded(h.beta2),
                rounded(1 - h.beta2),
                rounded(decoupled ? 0 : h.weight_decay),
                rounded(decoupled ? 1 - h.lr * h.weight_decay : 1),
                rectified ? 1.0f : 0.0f,
                rounded(rectified ? h.eps : 1),
                rounded(-h.lr / (1 - power(h.beta1, step)) * factor)};
    }

    template <class F, int n>
    OPTIM8_HD static void update(F& p, F g, F (&state)[n], const Scalars& s) {
        F& m = state[0];
        F& v = state[1];
        p = p * F(s.decay);
        // Not with weight_decay 0: 0 times an infinite parameter would be NaN.
        if (s.weight_decay != 0.0f) g = fma(F(s.weight_decay), p, g);
        m = fma(F(s.beta1), m, F(s.one_minus_beta1) * g);
        v = fma(F(s.beta2), v, F(s.one_minus_beta2) * g * g);
        // Where m = v = 0 and eps = 0 the quotient must be 0, not NaN.
        const F root = select(F(0.0f) < F(s.of_root), square_root(v), F(0.0f));  // v may be infinite
        const F denominator = maximum(F(smallest_normal), root + F(s.offset));
        p = fma(F(s.negative_step_size), m * reciprocal(denominator), p);
    }
};

OPTIM8_END
