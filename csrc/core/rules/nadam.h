// NAdam (Dozat 2016, "Incorporating Nesterov Momentum into Adam", ICLR workshop), as torch.optim defines it:
// mu_t = beta1 (1 - 0.96^(t momentum_decay) / 2), and weight decay is added to the gradient or taken off the parameter.
#pragma once

#include "core/rules/rule.h"

OPTIM8_BEGIN

struct NAdam : RuleDefaults {
    static constexpr const char* torch_name = "NAdam";
    static constexpr State states[] = {{"exp_avg", Code::Signed}, {"exp_avg_sq", Code::Positive, true}};
    static constexpr const char* running = "mu_product";  // mu_1 mu_2 .. mu_t, with the options that each step had
    static constexpr bool states_need_param = true;

    struct Hypers {
        double lr, beta1, beta2, eps, weight_decay, momentum_decay, decoupled_weight_decay;
    };
    static constexpr Hyper<Hypers> hypers[] = {
        number("lr", &Hypers::lr, 2e-3),
        beta("betas", 0, &Hypers::beta1, 0.9),
        beta("betas", 1, &Hypers::beta2, 0.999),
        number("eps", &Hypers::eps, 1e-8),
        number("weight_decay", &Hypers::weight_decay, 0.0),
        number("momentum_decay", &Hypers::momentum_decay, 4e-3),
        flag("decoupled_weight_decay", &Hypers::decoupled_weight_decay, false),
    };

    struct Scalars {
        float beta1, one_minus_beta1, beta2, one_minus_beta2, eps;
        float weight_decay, decay;       // added to the gradient; what is left of the parameter
        float of_gradient;               // -lr (1 - mu_t) / (1 - mu_1 .. mu_t)
        float of_momentum;               // -lr mu_(t+1) / (1 - mu_1 .. mu_(t+1))
        float inverse_sqrt_correction2;  // 1 / sqrt(1 - beta2^t)
    };
    OPTIM8_HD static double mu(const Hypers& h, double step) {
        constexpr double log_096 = -0.040821994520255166;
        return h.beta1 * (1 - 0.5 * exponential(step * h.momentum_decay * log_096));
    }
    OPTIM8_HD static Scalars derive(const Hypers& h, double step, float& mu_product) {
        const bool decoupled = h.decoupled_weight_decay != 0;
        const double now = mu(h, step), next = mu(h, step + 1);
        mu_product = rounded(mu_product * now);
        return {rounded(h.beta1),
                rounded(1 - h.beta1),
                rounded(h.beta2),
                rounded(1 - h.beta2),
                rounded(h.eps),
                rounded(decoupled ? 0 : h.weight_decay),
                rounded(decoupled ? 1 - h.lr * h.weight_decay : 1),
                rounded(-h.lr * (1 - now) / (1 - mu_product)),
                rounded(-h.lr * next / (1 - mu_product * next)),
                rounded(1 / sqrt(1 - power(h.beta2, step)))};
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
        // Where g = m = v = 0 and eps = 0 the quotient must be 0, not NaN.
        const F denominator = maximum(F(smallest_normal), fma(square_root(v), F(s.inverse_sqrt_correction2), F(s.eps)));
        p = fma(fma(F(s.of_gradient), g, F(s.of_momentum) * m), reciprocal(denominator), p);
    }
};

OPTIM8_END
