// Adam (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1) and AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101,
// algorithm 2), as torch.optim defines them: Adam adds weight decay to the gradient, AdamW takes it off the parameter.
#pragma once

#include "core/codec.h"
#include "core/hyper.h"

OPTIM8_BEGIN

template <bool decoupled>
struct AdamFamily {
    static constexpr int states = 2;  // exp_avg, exp_avg_sq
    static constexpr Code codes[states] = {Code::Signed, Code::Positive};
    static constexpr bool states_need_param = !decoupled;

    template <class F>
    OPTIM8_HD static void update(F& p, F g, F (&state)[states], const Scalars& s) {
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

using Adam = AdamFamily<false>;
using AdamW = AdamFamily<true>;

OPTIM8_END
