// The short square root and reciprocal of csrc/cuda/quick.h beside those of float: every mantissa, and the ends of the
// range. What depends on the hardware's own approximations is compared on a GPU, by experiments/gpu/check.py.
#include "compare.h"
#include "cuda/quick.h"

namespace optim8 {
namespace {

void expect(const char* what, float x, Quick actual, float expected, bool in_range) {
    ++compared;
    if (actual.in_range == in_range && (!in_range || same(actual.x, expected))) return;
    if (++differing <= 20)
        std::printf("%s of %a (bits %08x) is %a, in range %d; as a float %a, should be in range %d\n", what,
                    static_cast<double>(x), bits_of(x), static_cast<double>(actual.x), actual.in_range,
                    static_cast<double>(expected), in_range);
}

void check_root(uint32_t bits, bool in_range) {
    const float x = float_of(bits);
    expect("square_root", x, square_root(Quick(x)), square_root(x), in_range);
}
void check_reciprocal(uint32_t bits, bool in_range) {
    const float x = float_of(bits);
    expect("reciprocal", x, reciprocal(Quick(x)), 1.0f / x, in_range);
}

}  // namespace

void compare_quick() {
    constexpr uint32_t one = 0x3f800000u, binade = 1u << 23, sign_bit = 0x80000000u;
    for (uint32_t i = 0; i < 2 * binade; ++i) check_root(one + i, true);  // an even and an odd exponent
    for (uint32_t i = 0; i < binade; ++i) check_reciprocal(one + i, true);
    std::uniform_int_distribution<uint32_t> roots(0, 0x5effffffu), reciprocals(binade, 0x7e7fffffu);
    for (int i = 0; i < 1 << 20; ++i) {
        check_root(roots(generator), true);
        check_reciprocal(reciprocals(generator), true);
    }
    for (uint32_t i = 0; i < 1000; ++i) {
        check_root(i, true);  // 0 and the smallest subnormal numbers
        check_root(0x5effffffu - i, true);
        check_root(0x5f000000u + i, false);
        check_root(sign_bit + 1 + i, false);
        check_reciprocal(binade + i, true);
        check_reciprocal(0x7e7fffffu - i, true);
        check_reciprocal(0x7e800000u + i, false);
    }
    for (uint32_t bits : {inf_bits, inf_bits + 1, 0x7fffffffu}) {
        check_root(bits, false);
        check_reciprocal(bits, false);
    }
    // What was out of range once stays so.
    const Quick out = square_root(Quick(float_of(inf_bits))), in(1.0f);
    for (Quick q : {out * in, in * out, fma(in, in, out), maximum(out, in), sign(out), square_root(out * Quick(0.0f)),
                    reciprocal(maximum(in, out))})
        expect("what follows", 0.0f, q, 0.0f, false);
}

}  // namespace optim8
