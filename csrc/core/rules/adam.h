// Adam (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1) and AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101,
// algorithm 2), as torch.optim defines them: Adam adds weight decay to the gradient, AdamW takes it off the parameter.
#pragma once

#include "core/rules/rule.h"

OPTIM8_BEGIN

template <bool decoupled>
struct AdamFamily : RuleDefaults {
    static constexpr State states[] = {{"exp_avg", Code::Signed}, {"exp_avg_sq", Code::Positive, true}};
    static constexpr const char* torch_name = decoupled ? "AdamW" : "Adam";
    // The field's "adam" takes weight decay off the parameter.
    static constexpr const char* functional_name = decoupled ? "adam" : nullptr;
    static constexpr bool states_need_param = !decoupled;

    struct Hypers {
        double lr, beta1, beta2, eps, weight_decay;
    };
    static constexpr Hyper<Hypers> hypers[] = {
        number("lr", &Hypers::lr, 1e-3),
        beta("betas", 0, &Hypers::beta1, 0.9),
        beta("betas", 1, &Hypers::beta2, 0.999),
        number("eps", &Hypers::eps, 1e-8),
        number("weight_decay", &Hypers::weight_decay, decoupled ? 1e-2 : 0.0),
    };

    struct Scalars {
        float beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay;
        float decay;                     // 1 - lr * weight_decay
        float negative_step_size;        // -lr / (1 - beta1^t)
        float inverse_sqrt_correction2;  // 1 / sqrt(1 - beta2^t)
    };
    OPTIM8_HD static Scalars derive(const Hypers& h, double step) {
        return {rounded(h.beta1),
                rounded(1 - h.beta1),
                rounded(h.beta2),
                rounded(1 - h.beta2),
                rounded(h.eps),
                rounded(h.weight_decay),
                rounded(1 - h.lr * h.weight_decay),
                rounded(-h.lr / (1 - power(h.beta1, step))),
                rounded(1 / sqrt(1 - power(h.beta2, step)))};
    }

    template <class F, int n>
    OPTIM8_HD static void update(F& p, F g, F (&state)[n], const Scalars& s) {
        F& m = state[0];
        F& v = state[1];
        if (decoupled) p = p * F(s.decay);
        // Not with weight_decay 0: 0 times an infinite parameter would be NaN.
        if (!decoupled && s.weight_decay != 0.0f) g = fma(F(s.weight_decay), p, g);
        m = fma(F(s.beta1), m, F(s.one_minus_beta1) * g);
        v = fma(F(s.beta2), v, F(s.one_minus_beta2) * g * g);
        // Where m = v = 0 and eps = 0 the quotient must be 0, not NaN: such a parameter stays where it is.
        const F denominator = maximum(fma(square_root(v), F(s.inverse_sqrt_correction2), F(s.eps)), F(smallest_normal));
        p = fma(F(s.negative_step_size), m * reciprocal(denominator), p);
    }
};

struct Adam : AdamFamily<false> {};
struct AdamW : AdamFamily<true> {};

OPTIM8_END
