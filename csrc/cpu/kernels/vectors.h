// The number type of a step: several vectors that take each operation of a rule together. A scalar is read once for all
// of them, and while one waits for its root or quotient, the others' can begin.
#pragma once

#include "cpu/kernels/simd.h"

OPTIM8_BEGIN

constexpr int group_vectors = code_group / width;
constexpr int together = group_vectors < 4 ? group_vectors : 4;

struct Vectors {
    F v[together];
    Vectors() = default;
    OPTIM8_HD explicit Vectors(float x) {
        for (F& vector : v) vector = F(x);
    }
    // make(i) for each vector
    template <class Make>
    OPTIM8_HD static Vectors of(const Make& make) {
        Vectors made;
        for (int i = 0; i < together; ++i) made.v[i] = make(i);
        return made;
    }
};
struct VectorsCondition {
    decltype(F() < F()) v[together];
    template <class Make>
    OPTIM8_HD static VectorsCondition of(const Make& make) {
        VectorsCondition made;
        for (int i = 0; i < together; ++i) made.v[i] = make(i);
        return made;
    }
};

#define OPTIM8_VECTORS(type, name, parameters, expression) \
    OPTIM8_HD type name parameters { \
        return type::of([&](int i) { return expression; }); \
    }
OPTIM8_VECTORS(Vectors, operator+, (const Vectors& a, const Vectors& b), a.v[i] + b.v[i])
OPTIM8_VECTORS(Vectors, operator-, (const Vectors& a, const Vectors& b), a.v[i] - b.v[i])
OPTIM8_VECTORS(Vectors, operator*, (const Vectors& a, const Vectors& b), (a.v[i] * b.v[i]))
OPTIM8_VECTORS(Vectors, operator-, (const Vectors& a), -a.v[i])
OPTIM8_VECTORS(Vectors, fma, (const Vectors& a, const Vectors& b, const Vectors& c), fma(a.v[i], b.v[i], c.v[i]))
OPTIM8_VECTORS(Vectors, minimum, (const Vectors& a, const Vectors& b), minimum(a.v[i], b.v[i]))
OPTIM8_VECTORS(Vectors, maximum, (const Vectors& a, const Vectors& b), maximum(a.v[i], b.v[i]))
OPTIM8_VECTORS(Vectors, absolute, (const Vectors& a), absolute(a.v[i]))
OPTIM8_VECTORS(Vectors, sign, (const Vectors& a), sign(a.v[i]))
OPTIM8_VECTORS(Vectors, square_root, (const Vectors& a), square_root(a.v[i]))
OPTIM8_VECTORS(Vectors, reciprocal, (const Vectors& a), reciprocal(a.v[i]))
OPTIM8_VECTORS(VectorsCondition, operator<, (const Vectors& a, const Vectors& b), a.v[i] < b.v[i])
OPTIM8_VECTORS(VectorsCondition, operator>, (const Vectors& a, const Vectors& b), a.v[i] > b.v[i])
OPTIM8_VECTORS(Vectors, select, (const VectorsCondition& c, const Vectors& a, const Vectors& b),
               select(c.v[i], a.v[i], b.v[i]))
#undef OPTIM8_VECTORS

static_assert(Vocabulary<Vectors>::complete);

OPTIM8_END
