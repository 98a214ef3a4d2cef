// The named scalars of a step: what a user sets, and what the rules use.
#pragma once

#include "core/scalar.h"

#include <cmath>

namespace optim8 {

// As given by the user, in double.
struct Hyper {
    double lr = 0, beta1 = 0, beta2 = 0, eps = 0, weight_decay = 0;
    bool maximize = false;
    double gradient_scale = 1;  // every gradient is multiplied by it (1 / loss scale)
    // On a CUDA device: steps are counted there, so that whether a step is made at all may be decided there.
    bool count_on_device = false;
    const float* device_lr = nullptr;  // where lr stands in device memory, instead of `lr`; needs count_on_device
};

// As used by the rules, in float32. One rounding each, from double.
struct Scalars {
    float lr, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay;
    float gradient_factor;           // gradient_scale, negated to maximize
    float decay;                     // 1 - lr * weight_decay
    float negative_step_size;        // -lr / (1 - beta1^t)
    float inverse_sqrt_correction2;  // 1 / sqrt(1 - beta2^t)
};

}  // namespace optim8

OPTIM8_BEGIN

// base^exponent for a whole exponent, by squaring: float64 multiplications in an order of its own, so that host and
// device agree, which their libraries' pow do not promise.
OPTIM8_HD double power(double base, double exponent) {
    constexpr double most = 9007199254740992.0;  // 2^53
    double result = 1;
    for (uint64_t left = exponent > 0 ? static_cast<uint64_t>(exponent < most ? exponent : most) : 0; left != 0;
         left >>= 1, base *= base)
        if (left & 1) result *= base;
    return result;
}

OPTIM8_HD Scalars derive(const Hyper& h, double step) {
    Scalars s;
    s.lr = static_cast<float>(h.lr);
    s.beta1 = static_cast<float>(h.beta1);
    s.one_minus_beta1 = static_cast<float>(1 - h.beta1);
    s.beta2 = static_cast<float>(h.beta2);
    s.one_minus_beta2 = static_cast<float>(1 - h.beta2);
    s.eps = static_cast<float>(h.eps);
    s.weight_decay = static_cast<float>(h.weight_decay);
    s.gradient_factor = static_cast<float>(h.maximize ? -h.gradient_scale : h.gradient_scale);
    s.decay = static_cast<float>(1 - h.lr * h.weight_decay);
    s.negative_step_size = static_cast<float>(-h.lr / (1 - power(h.beta1, step)));
    s.inverse_sqrt_correction2 = static_cast<float>(1 / sqrt(1 - power(h.beta2, step)));
    return s;
}

OPTIM8_END
