// THE vocabulary of a rule: the operations that its `update` is written in. Every number type offers each of them with
// the same bits in each lane, so that one formula serves scalar code, SIMD vectors and a CUDA thread: float
// (core/scalar.h), F (cpu/kernels/simd_*.h), and Quick (cuda/quick.h) as long as it is in range.
//
// Numbers are IEEE 754 float32. Results are rounded to nearest, ties to even, and subnormal numbers count as what they
// are, operands and results. What is not a number has the bits that a machine gives it, sign included.
#pragma once

#include "core/scalar.h"

#include <type_traits>

// X(name, expression of a, b and c)
//   add, subtract, multiply, fma: as IEEE 754 says; fma rounds once.
//   negate, absolute: the sign bit flipped, or cleared; of zeros and infinities too.
//   minimum, maximum: a if a < b (a > b), else b. So b where either is NaN, and where both are zeros.
//   sign: -1, 0 or 1; +0 for both zeros and for NaN, as torch.sign.
//   square_root: of -0 it is -0; of a negative number NaN.
//   reciprocal: 1 / a. Of Quick, `a` must be at least smallest_normal: say maximum(a, F(smallest_normal)) first.
//   select: the second where the condition holds, else the third. What it leaves out may be anything, such as NaN.
//   Conditions, a < b and a > b, do not hold where either is NaN, nor between zeros.
#define OPTIM8_NUMBER_OPERATIONS(X) \
    X(add, a + b) \
    X(subtract, a - b) \
    X(multiply, (a * b)) \
    X(negate, -a) \
    X(fma, fma(a, b, c)) \
    X(minimum, minimum(a, b)) \
    X(maximum, maximum(a, b)) \
    X(absolute, absolute(a)) \
    X(sign, sign(a)) \
    X(square_root, square_root(a)) \
    X(reciprocal, reciprocal(a)) \
    X(select_less, select(a < b, b, c)) \
    X(select_greater, select(a > b, b, c))

namespace optim8 {

enum class NumberOperation : uint8_t {
#define OPTIM8_NUMBER_OPERATION(name, expression) name,
    OPTIM8_NUMBER_OPERATIONS(OPTIM8_NUMBER_OPERATION)
#undef OPTIM8_NUMBER_OPERATION
};
constexpr const char* number_operation_names[] = {
#define OPTIM8_NUMBER_OPERATION(name, expression) #name,
    OPTIM8_NUMBER_OPERATIONS(OPTIM8_NUMBER_OPERATION)
#undef OPTIM8_NUMBER_OPERATION
};

}  // namespace optim8

OPTIM8_BEGIN

// Complete for a type that offers every word of the vocabulary; for another it does not compile.
template <class F>
struct Vocabulary {
    static F a, b, c;  // declared only
#define OPTIM8_NUMBER_OPERATION(name, expression) \
    static_assert(std::is_same_v<decltype(expression), F>, #name " gives a number of the same type");
    OPTIM8_NUMBER_OPERATIONS(OPTIM8_NUMBER_OPERATION)
#undef OPTIM8_NUMBER_OPERATION
    static constexpr bool complete = true;
};

static_assert(Vocabulary<float>::complete);

// One operation, chosen by its name; for tests.
template <class F>
OPTIM8_HD F apply(NumberOperation operation, F a, F b, F c) {
    switch (operation) {
#define OPTIM8_NUMBER_OPERATION(name, expression) \
    case NumberOperation::name: \
        return expression;
        OPTIM8_NUMBER_OPERATIONS(OPTIM8_NUMBER_OPERATION)
#undef OPTIM8_NUMBER_OPERATION
    }
    return a;
}

OPTIM8_END
