// Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2): a step of fixed size along the sign of an interpolation of
// momentum and gradient, with decoupled weight decay.
#pragma once

#include "core/codec.h"
#include "core/hyper.h"

OPTIM8_BEGIN

struct Lion {
    static constexpr int states = 1;  // exp_avg
    static constexpr Code codes[states] = {Code::Signed};
    static constexpr bool states_need_param = false;

    template <class F>
    OPTIM8_HD static void update(F& p, F g, F (&state)[states], const Scalars& s) {
        F& m = state[0];
        const F direction = sign(fma(F(s.beta1), m, F(s.one_minus_beta1) * g));
        p = fma(F(-s.lr), direction, p * F(s.decay));
        m = fma(F(s.beta2), m, F(s.one_minus_beta2) * g);
    }
};

OPTIM8_END
