// AdEMAMix (Pagliardini, Ablin and Grangier 2024, arXiv 2409.03137, algorithm 1): AdamW with a second, slow first
// moment, which has no bias correction. Its weight alpha grows to its value over t_alpha steps, and its half-life to
// that of beta3 over t_beta3 steps, both linearly (section 3 and appendix A.1).
#pragma once

#include "core/rules/rule.h"

OPTIM8_BEGIN

struct AdEMAMix : RuleDefaults {
    // With beta3 = 0.9999 a step changes the slow moment by a ten-thousandth of the gradient, far less than a code of 8
    // bits is wide.
    static constexpr State states[] = {
        {"exp_avg", Code::Signed}, {"exp_avg_slow", Code::Signed, false, true}, {"exp_avg_sq", Code::Positive, true}};
    static constexpr bool states_need_param = false;

    struct Hypers {
        double lr, beta1, beta2, beta3, alpha, t_alpha, t_beta3, eps, weight_decay;
    };
    static constexpr Hyper<Hypers> hypers[] = {
        number("lr", &Hypers::lr, 1e-3),
        beta("betas", 0, &Hypers::beta1, 0.9),
        beta("betas", 1, &Hypers::beta2, 0.999),
        beta("betas", 2, &Hypers::beta3, 0.9999),
        number("alpha", &Hypers::alpha, 5.0),
        optional("t_alpha", &Hypers::t_alpha),
        optional("t_beta3", &Hypers::t_beta3),
        number("eps", &Hypers::eps, 1e-8),
        number("weight_decay", &Hypers::weight_decay, 1e-2),
    };

    struct Scalars {
        float beta1, one_minus_beta1, beta2, one_minus_beta2, beta3, one_minus_beta3, alpha, eps;
        float decay;  // 1 - lr * weight_decay
        float negative_lr;
        float inverse_correction1;       // 1 / (1 - beta1^t)
        float inverse_sqrt_correction2;  // 1 / sqrt(1 - beta2^t)
    };
    // beta3 of this step: half-lives are as 1 / log(beta), so the inverse logarithm goes linearly from that of beta1.
    OPTIM8_HD static double beta3_at(const Hypers& h, double step) {
        const double part = step / h.t_beta3;
        if (h.t_beta3 == 0 || part >= 1 || h.beta3 <= h.beta1) return h.beta3;
        const double log3 = logarithm(h.beta3);
        const double ratio = h.beta1 > 0 ? log3 / logarithm(h.beta1) : 0;
        return exponential(log3 / ((1 - part) * ratio + part));
    }
    OPTIM8_HD static Scalars derive(const Hypers& h, double step) {
        const double beta3 = beta3_at(h, step);
        return {rounded(h.beta1),
                rounded(1 - h.beta1),
                rounded(h.beta2),
                rounded(1 - h.beta2),
                rounded(beta3),
                rounded(1 - beta3),
                rounded(step < h.t_alpha ? step / h.t_alpha * h.alpha : h.alpha),
                rounded(h.eps),
                rounded(1 - h.lr * h.weight_decay),
                rounded(-h.lr),
                rounded(1 / (1 - power(h.beta1, step))),
                rounded(1 / sqrt(1 - power(h.beta2, step)))};
    }

    template <class F, int n>
    OPTIM8_HD static void update(F& p, F g, F (&state)[n], const Scalars& s) {
        F& fast = state[0];
        F& slow = state[1];
        F& v = state[2];
        fast = fma(F(s.beta1), fast, F(s.one_minus_beta1) * g);
        slow = fma(F(s.beta3), slow, F(s.one_minus_beta3) * g);
        v = fma(F(s.beta2), v, F(s.one_minus_beta2) * g * g);
        const F momentum = fma(F(s.alpha), slow, fast * F(s.inverse_correction1));
        // Where g = v = 0 and eps = 0 the quotient must be 0, not NaN.
        const F denominator = maximum(F(smallest_normal), fma(square_root(v), F(s.inverse_sqrt_correction2), F(s.eps)));
        p = fma(F(s.negative_lr), momentum * reciprocal(denominator), p * F(s.decay));
    }
};

OPTIM8_END
