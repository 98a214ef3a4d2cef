// Adam (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1) and AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101,
// algorithm 2), as torch.optim defines them: Adam adds weight decay to the gradient, AdamW takes it off the parameter.
#pragma once

#include "core/rules/rule.h"

OPTIM8_BEGIN

template <bool decoupled>
struct AdamOptions : RuleDefaults {
    static constexpr const char* torch_name = decoupled ? "AdamW" : "Adam";
    static constexpr bool states_need_param = !decoupled;

    struct Hypers {
        double lr, beta1, beta2, eps, weight_decay, amsgrad;
    };
    static constexpr Hyper<Hypers> hypers[] = {
        number("lr", &Hypers::lr, 1e-3),
        beta("betas", 0, &Hypers::beta1, 0.9),
        beta("betas", 1, &Hypers::beta2, 0.999),
        number("eps", &Hypers::eps, 1e-8),
        number("weight_decay", &Hypers::weight_decay, decoupled ? 1e-2 : 0.0),
        flag("amsgrad", &Hypers::amsgrad, false),
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

    // The new moments of a gradient; takes weight decay off the parameter, or adds it to the gradient.
    template <class F>
    OPTIM8_HD static void advance(F& p, F g, F& m, F& v, const Scalars& s) {
        if (decoupled) p = p * F(s.decay);
        // Not with weight_decay 0: 0 times an infinite parameter would be NaN.
        if (!decoupled && s.weight_decay != 0.0f) g = fma(F(s.weight_decay), p, g);
        m = fma(F(s.beta1), m, F(s.one_minus_beta1) * g);
        v = fma(F(s.beta2), v, F(s.one_minus_beta2) * g * g);
    }
    // A step along m over the root of v.
    template <class F>
    OPTIM8_HD static void move(F& p, F m, F v, const Scalars& s) {
        // Where m = v = 0 and eps = 0 the quotient must be 0, not NaN: such a parameter stays where it is.
        const F denominator = maximum(fma(square_root(v), F(s.inverse_sqrt_correction2), F(s.eps)), F(smallest_normal));
        p = fma(F(s.negative_step_size), m * reciprocal(denominator), p);
    }
};

template <bool decoupled>
struct AdamFamily : AdamOptions<decoupled> {
    using Options = AdamOptions<decoupled>;
    static constexpr State states[] = {{"exp_avg", Code::Signed}, {"exp_avg_sq", Code::Positive, true}};
    static constexpr bool in_columns = true;
    // The field's "adam" takes weight decay off the parameter.
    static constexpr const char* functional_name = decoupled ? "adam" : nullptr;
    static bool serves(const typename Options::Hypers& h) { return h.amsgrad == 0; }

    template <class F, int n>
    OPTIM8_HD static void update(F& p, F g, F (&state)[n], const typename Options::Scalars& s) {
        Options::advance(p, g, state[0], state[1], s);
        Options::move(p, state[0], state[1], s);
    }
};

// With the largest second moment so far in the denominator (Reddi, Kale and Kumar 2018, "On the convergence of Adam and
// beyond", algorithm 2); as in torch.optim it is the largest before the correction of its bias.
template <bool decoupled>
struct AmsgradFamily : AdamOptions<decoupled> {
    using Options = AdamOptions<decoupled>;
    static constexpr State states[] = {
        {"exp_avg", Code::Signed}, {"exp_avg_sq", Code::Positive, true}, {"max_exp_avg_sq", Code::Positive, true}};

    template <class F, int n>
    OPTIM8_HD static void update(F& p, F g, F (&state)[n], const typename Options::Scalars& s) {
        Options::advance(p, g, state[0], state[1], s);
        state[2] = maximum(state[2], state[1]);
        Options::move(p, state[0], state[2], s);
    }
};

struct Adam : AdamFamily<false> {};
struct AdamW : AdamFamily<true> {};
struct AdamAmsgrad : AmsgradFamily<false> {
    static constexpr const char* family = "adam";
};
struct AdamWAmsgrad : AmsgradFamily<true> {
    static constexpr const char* family = "adamw";
};

OPTIM8_END
