// LARS (You, Gitman and Ginsburg 2017, arXiv 1708.03888, algorithm 1): SGD with momentum whose gradient, weight decay
// included, is scaled for each tensor by the norms of parameter and gradient. The learning rate stays outside of the
// momentum, as SGD has it, so that a change of it acts at once; in the paper it is inside.
#pragma once

#include "core/rules/sgd.h"

OPTIM8_BEGIN

struct LARSOptions : SGDOptions {
    static constexpr const char* torch_name = nullptr;
    static constexpr bool has_norms = true;

    struct Hypers : SGDOptions::Hypers {
        double trust_coefficient;
    };
    static constexpr Hyper<Hypers> hypers[] = {
        number<Hypers>("lr", &Hypers::lr, 1e-3),
        number<Hypers>("momentum", &Hypers::momentum, 0.9),
        number<Hypers>("dampening", &Hypers::dampening, 0.0),
        number<Hypers>("weight_decay", &Hypers::weight_decay, 0.0),
        flag<Hypers>("nesterov", &Hypers::nesterov, false),
        number<Hypers>("trust_coefficient", &Hypers::trust_coefficient, 1e-3),
    };

    struct Scalars : SGDOptions::Scalars {
        float trust_coefficient;
        float enlarged, ratio;  // what scales the gradient is the product of both
    };
    OPTIM8_HD static Scalars derive(const Hypers& h, double step) {
        return {SGDOptions::derive(h, step), rounded(h.trust_coefficient), 1.0f, 1.0f};
    }
    // The ratio is 1 where the parameter is 0, which would stay there otherwise; and where there is nothing to scale.
    // Of a tiny gradient it is beyond float32, though its product with the gradient is not: no element of that is above
    // trust_coefficient times the parameter's norm. So 2^127 of it is a factor of its own, exact and applied first.
    OPTIM8_HD static Scalars trust(Scalars s, double of_param, double of_gradient) {
        const double below = of_gradient + static_cast<double>(s.weight_decay) * of_param;
        if (!(of_param > 0 && below > 0)) return s;
        double ratio = static_cast<double>(s.trust_coefficient) * of_param / below;
        if (ratio > 0x1p127) {
            s.enlarged = 0x1p127f;
            ratio *= 0x1p-127;
            // Over 2^128 only if trust_coefficient * of_param is over 2^106: kept finite, as 0 times infinity is NaN.
            if (ratio > 0x1.fffffep127 && ratio * 0 == 0) ratio = 0x1.fffffep127;
        }
        s.ratio = rounded(ratio);
        return s;
    }
    // The gradient, weight decay included, to the scale of the parameter.
    template <class F>
    OPTIM8_HD static F scaled(F g, F p, const Scalars& s) {
        return penalized(g, p, s) * F(s.enlarged) * F(s.ratio);
    }
    // The norms are those of parameter and gradient.
    template <class F, int n>
    OPTIM8_HD static void measure(F p, F g, const F (&)[n], const Scalars&, F (&of)[2]) {
        of[0] = p;
        of[1] = g;
    }
};

struct LARS : LARSOptions {
    static bool serves(const Hypers& h) { return h.momentum != 0; }

    template <class F, int n>
    OPTIM8_HD static void update(F& p, F g, F (&state)[n], const Scalars& s) {
        move(p, scaled(g, p, s), state[0], s);
    }
};

// Without momentum.
struct PlainLARS : LARSOptions {
    static constexpr const char* family = "lars";
    static constexpr bool stateless = true;

    template <class F, int n>
    OPTIM8_HD static void update(F& p, F g, F (&)[n], const Scalars& s) {
        move(p, scaled(g, p, s), s);
    }
};

OPTIM8_END
