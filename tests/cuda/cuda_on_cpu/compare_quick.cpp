// Quick of csrc/cuda/quick.h beside float: its short square root and reciprocal for every mantissa and at the ends of
// the range, and every operation of csrc/core/number.h on hostile numbers, there beside the CPU's kernel too. What
// depends on the hardware's own approximations is compared on a GPU, by experiments/gpu/check.py.
#include "compare.h"
#include "core/rules/all.h"
#include "cuda/bounded.h"

#include <iterator>

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
    Bounds bounds;
    const Bounded root = square_root(Bounded(x, &bounds));
    expect("bounded square_root", x, Quick(plain(root), bounds.hold()), square_root(x), in_range && x < 0x1p62f);
}
void check_reciprocal(uint32_t bits, bool in_range) {
    const float x = float_of(bits);
    expect("reciprocal", x, reciprocal(Quick(x)), 1.0f / x, in_range);
}

// Whether Quick may hold the result to be out of range.
bool may_leave_range(NumberOperation operation) {
    return operation == NumberOperation::square_root || operation == NumberOperation::reciprocal;
}

void check_operations() {
    const float magnitudes[] = {0.0f,
                                0x1p-149f,
                                0x1p-127f,
                                0x1p-126f,
                                3e-30f,
                                1e-8f,
                                1.0f / 3,
                                1.0f,
                                1.0f + 0x1p-23f,
                                3.0f,
                                0x1p126f,
                                0x1.fffffep127f,
                                float_of(inf_bits),
                                float_of(inf_bits + 1)};
    std::vector<float> numbers;
    for (const float magnitude : magnitudes)
        for (const float number : {magnitude, -magnitude}) numbers.push_back(number);
    std::vector<float> a, b, c;
    for (const float x : numbers)
        for (const float y : numbers)
            for (const float z : numbers) a.push_back(x), b.push_back(y), c.push_back(z);
    for (int i = 0; i < 100003; ++i)
        for (std::vector<float>* operand : {&a, &b, &c})
            operand->push_back(float_of(static_cast<uint32_t>(generator())));
    std::vector<float> kernel(a.size());
    const int64_t size = static_cast<int64_t>(a.size());
    for (size_t o = 0; o < std::size(number_operation_names); ++o) {
        const auto operation = static_cast<NumberOperation>(o);
        const NumberJob job{operation, a.data(), b.data(), c.data(), kernel.data(), size};
        scalar::number_blocks(job, 0, blocks_of(size, step_block));
        for (size_t i = 0; i < a.size(); ++i) {
            const float exact = apply(operation, a[i], b[i], c[i]);
            expect(number_operation_names[o], a[i], Quick(exact), kernel[i], true);
            const Quick quick = apply(operation, Quick(a[i]), Quick(b[i]), Quick(c[i]));
            expect(number_operation_names[o], a[i], quick, exact, quick.in_range || !may_leave_range(operation));
            // A constant of Bounded's maximum that Range must have looked at, and divisors.
            if (operation == NumberOperation::reciprocal && !(a[i] >= smallest_normal && a[i] < 0x1p126f)) continue;
            Bounds bounds;
            const Bounded bounded =
                apply(operation, Bounded(a[i], &bounds), Bounded(b[i], &bounds), Bounded(c[i], &bounds));
            if (bounds.hold()) expect(number_operation_names[o], a[i], Quick(plain(bounded)), exact, true);
        }
    }
}

// Scalars that Bounded serves, and such that the denominator may be 0 or too large, or a constant too small to scale.
void check_bounds() {
    const auto check = [](float correction, float eps, bool serve) {
        AdamW::Scalars scalars{0.9f, 0.1f, 0.999f, 0.001f, eps, 0.01f, 0.999f, -1e-3f, correction};
        expect("bounds_serve", eps, Quick(0.0f, bounds_serve<AdamW>(scalars)), 0.0f, serve);
    };
    for (float eps : {smallest_normal, 1e-8f, 1.0f, 0x1p125f}) check(1.5f, eps, true);
    for (float eps : {0.0f, 0x1p-127f, -1.0f, 0x1p126f, float_of(inf_bits), float_of(inf_bits + 1)})
        check(1.5f, eps, false);
    for (float correction : {0x1p-91f, 0x1p96f, float_of(inf_bits), float_of(inf_bits + 1)})
        check(correction, 1e-8f, false);
    ++compared;
    if (!bounds_serve<Lion>(Lion::Scalars{})) ++differing;
}

}  // namespace

void compare_quick() {
    check_operations();
    check_bounds();
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
        check_reciprocal(i, false);  // 0 and the smallest subnormal numbers
        check_reciprocal(binade - 1 - i, false);
        check_reciprocal(binade + i, true);
        for (const uint32_t bits : {i, binade - 1 - i, 0x7e800000u + i}) check_reciprocal(sign_bit + bits, false);
        for (const uint32_t bits : {binade + i, 0x7e7fffffu - i}) check_reciprocal(sign_bit + bits, true);
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
                    reciprocal(maximum(in, out)), out + in, in - out, -out, minimum(in, out), absolute(out),
                    select(in < out, in, in), select(in > out, in, in), select(in < in, in, out),
                    select(in > in * Quick(0.0f), out, in)})
        expect("what follows", 0.0f, q, 0.0f, false);
    expect("what is left out", 0.0f, select(in < in, out, in), 1.0f, true);
}

}  // namespace optim8
