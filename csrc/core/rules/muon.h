// Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks",
// kellerjordan.github.io/posts/muon) as torch.optim defines it. Its groups with use_muon=False step as AdamW.
#pragma once

#include "core/rules/adam.h"

OPTIM8_BEGIN

struct MuonHypers {
    double lr, weight_decay, momentum, nesterov, eps, use_muon, beta1, beta2;
};

struct MuonFamily : RuleDefaults {
    static constexpr const char* family = "muon";
    static constexpr bool states_need_param = false;

    using Hypers = MuonHypers;
    static constexpr Hyper<Hypers> hypers[] = {
        number("lr", &Hypers::lr, 1e-3),
        number("weight_decay", &Hypers::weight_decay, 0.1),
        number("momentum", &Hypers::momentum, 0.95),
        flag("nesterov", &Hypers::nesterov, true),
        number("eps", &Hypers::eps, 1e-7),
        flag("use_muon", &Hypers::use_muon, true),
        beta("betas", 0, &Hypers::beta1, 0.9),
        beta("betas", 1, &Hypers::beta2, 0.999),
    };
};

// The elementwise part: the new momentum, and in the place of the parameter the direction. What follows needs the whole
// matrix: the direction is orthogonalized, and the parameter goes along the result.
struct Muon : MuonFamily {
    static constexpr State states[] = {{"momentum_buffer", Code::Signed}};
    static constexpr const char* torch_name = "Muon";
    static constexpr bool gives_direction = true;
    static bool serves(const Hypers& h) { return h.use_muon != 0; }

    struct Scalars {
        float momentum, fresh, nesterov;
    };
    OPTIM8_HD static Scalars derive(const Hypers& h, double) {
        return {rounded(h.momentum), rounded(1 - h.momentum), rounded(h.nesterov)};
    }

    // The point between a (weight 0) and b (weight 1); from the nearer end, as torch.lerp, so that it is b at weight 1.
    template <class F>
    OPTIM8_HD static F between(F a, F b, float weight) {
        return weight < 0.5f ? fma(F(weight), b - a, a) : fma(F(weight - 1.0f), b - a, b);
    }

    template <class F, int n>
    OPTIM8_HD static void update(F& p, F g, F (&state)[n], const Scalars& s) {
        F& m = state[0];
        m = between(m, g, s.fresh);
        p = s.nesterov != 0.0f ? between(g, m, s.momentum) : m;
    }
};

struct MuonAdamW : MuonFamily {
    static constexpr State states[] = {{"exp_avg", Code::Signed}, {"exp_avg_sq", Code::Positive, true}};

    using Scalars = AdamW::Scalars;
    OPTIM8_HD static Scalars derive(const Hypers& h, double step) {
        AdamW::Hypers of_adamw{};
        of_adamw.lr = h.lr;
        of_adamw.beta1 = h.beta1;
        of_adamw.beta2 = h.beta2;
        of_adamw.eps = h.eps;
        of_adamw.weight_decay = h.weight_decay;
        return AdamW::derive(of_adamw, step);
    }
    template <class F, int n>
    OPTIM8_HD static void update(F& p, F g, F (&state)[n], const Scalars& s) {
        AdamW::update(p, g, state, s);
    }
};

OPTIM8_END
