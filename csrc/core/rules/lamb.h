// LAMB (You et al. 2020, arXiv 1904.00962, algorithm 2): Adam's direction with decoupled weight decay in it, scaled for
// each tensor to the norm of the parameter. The function phi of the paper is the identity: nothing is clipped.
#pragma once

#include "core/rules/rule.h"

OPTIM8_BEGIN

struct LAMB : RuleDefaults {
    static constexpr State states[] = {{"exp_avg", Code::Signed}, {"exp_avg_sq", Code::Positive, true}};
    static constexpr bool states_need_param = false;
    static constexpr bool has_norms = true;

    struct Hypers {
        double lr, beta1, beta2, eps, weight_decay;
    };
    static constexpr Hyper<Hypers> hypers[] = {
        number("lr", &Hypers::lr, 1e-3),
        beta("betas", 0, &Hypers::beta1, 0.9),
        beta("betas", 1, &Hypers::beta2, 0.999),
        number("eps", &Hypers::eps, 1e-8),
        number("weight_decay", &Hypers::weight_decay, 0.0),
    };

    struct Scalars {
        float beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay;
        float inverse_correction1;       // 1 / (1 - beta1^t)
        float inverse_sqrt_correction2;  // 1 / sqrt(1 - beta2^t)
        float negative_step_size;        // -lr, times the ratio of the tensor's norms
    };
    OPTIM8_HD static Scalars derive(const Hypers& h, double step) {
        return {rounded(h.beta1),
                rounded(1 - h.beta1),
                rounded(h.beta2),
                rounded(1 - h.beta2),
                rounded(h.eps),
                rounded(h.weight_decay),
                rounded(1 / (1 - power(h.beta1, step))),
                rounded(1 / sqrt(1 - power(h.beta2, step))),
                rounded(-h.lr)};
    }
    // The ratio is 1 where a norm is 0: else a parameter that begins at 0 would stay there.
    OPTIM8_HD static Scalars trust(Scalars s, double of_param, double of_direction) {
        const double ratio = of_param > 0 && of_direction > 0 ? of_param / of_direction : 1;
        s.negative_step_size = rounded(static_cast<double>(s.negative_step_size) * ratio);
        return s;
    }

    // The new moments of a gradient, and the direction of the step: towards what is subtracted.
    template <class F>
    OPTIM8_HD static F advance(F p, F g, F& m, F& v, const Scalars& s) {
        m = fma(F(s.beta1), m, F(s.one_minus_beta1) * g);
        v = fma(F(s.beta2), v, F(s.one_minus_beta2) * g * g);
        // Where m = v = 0 and eps = 0 the quotient must be 0, not NaN.
        const F denominator = maximum(fma(square_root(v), F(s.inverse_sqrt_correction2), F(s.eps)), F(smallest_normal));
        const F quotient = m * F(s.inverse_correction1) * reciprocal(denominator);
        // Not with weight_decay 0: 0 times an infinite parameter would be NaN.
        return s.weight_decay != 0.0f ? fma(F(s.weight_decay), p, quotient) : quotient;
    }
    // The norms are those of parameter and direction.
    template <class F, int n>
    OPTIM8_HD static void measure(F p, F g, const F (&state)[n], const Scalars& s, F (&of)[2]) {
        F m = state[0], v = state[1];
        of[0] = p;
        of[1] = advance(p, g, m, v, s);
    }
    template <class F, int n>
    OPTIM8_HD static void update(F& p, F g, F (&state)[n], const Scalars& s) {
        const F direction = advance(p, g, state[0], state[1], s);
        p = fma(F(s.negative_step_size), direction, p);
    }
};

OPTIM8_END
