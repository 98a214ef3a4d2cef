// The number types of the step over columns (cuda/step_columns.h): one that looks at the numbers of a lane all at once,
// and one that says for which scalars of a step that is enough.
#pragma once

#include "cuda/quick.h"

OPTIM8_BEGIN

// The largest of numbers, as bits: negative ones and NaN are above all others. They are taken in pairs, since from
// compute capability 9.0 on an instruction takes three integers; which one waits is known when this is compiled.
struct Largest {
    uint32_t so_far = 0, waiting = 0;
    bool waits = false;
    OPTIM8_DEVICE void add(float x) {
        if (waits) so_far = maximum(so_far, maximum(waiting, bits_of(x)));
        waiting = bits_of(x);
        waits = !waits;
    }
    OPTIM8_DEVICE uint32_t bits() const { return waits ? maximum(so_far, waiting) : so_far; }
};

constexpr float most_root = 0x1p31f;
constexpr uint32_t most_scaled_root = 0x5f000000u;  // of scaled_root: most_root * 2^32

// What the numbers of a lane share.
struct Bounds {
    Largest root;  // scaled
    uint32_t one = bits_of(1.0f);
    OPTIM8_DEVICE Bounds() { keep_in_register(one); }
    // Whether all roots were those of `float`: an operand that is not below 2^62, or negative, gives a root that is not
    // below most_root, or negative, or no number.
    OPTIM8_DEVICE bool hold() const { return root.bits() < most_scaled_root; }
};

// A number with the bits of `float` where its Bounds hold and Range, below, was sound. Nothing else is looked at, and
// what has no effect then is left out: maximum(x, F(smallest_normal)) is x.
struct Bounded {
    float x;         // times 2^32 where `scaled`: a root that nothing has been computed from yet. Known when compiled.
    Bounds* bounds;  // of the lane; null for a constant
    bool scaled;
    Bounded() = default;
    OPTIM8_DEVICE explicit Bounded(float x, Bounds* bounds = nullptr, bool scaled = false)
        : x(x), bounds(bounds), scaled(scaled) {}
    OPTIM8_DEVICE Bounds* either(Bounded other) const { return bounds != nullptr ? bounds : other.bounds; }
};

OPTIM8_DEVICE float plain(Bounded a) { return a.scaled ? a.x * 0x1p-32f : a.x; }
OPTIM8_DEVICE Bounded operator+(Bounded a, Bounded b) { return Bounded(plain(a) + plain(b), a.either(b)); }
OPTIM8_DEVICE Bounded operator-(Bounded a, Bounded b) { return Bounded(plain(a) - plain(b), a.either(b)); }
OPTIM8_DEVICE Bounded operator-(Bounded a) { return Bounded(-a.x, a.bounds, a.scaled); }
OPTIM8_DEVICE Bounded operator*(Bounded a, Bounded b) { return Bounded(plain(a) * plain(b), a.either(b)); }
OPTIM8_DEVICE Bounded fma(Bounded a, Bounded b, Bounded c) {
    Bounds* bounds = a.bounds != nullptr ? a.bounds : b.either(c);
    // The same product, and the constant is scaled once for all numbers.
    if (a.scaled && b.bounds == nullptr) return Bounded(fma(a.x, b.x * 0x1p-32f, plain(c)), bounds);
    return Bounded(fma(plain(a), plain(b), plain(c)), bounds);
}
OPTIM8_DEVICE Bounded maximum(Bounded a, Bounded b) {
    if (b.bounds == nullptr && b.x == smallest_normal) return a;
    return Bounded(maximum(plain(a), plain(b)), a.either(b));
}
OPTIM8_DEVICE Bounded minimum(Bounded a, Bounded b) { return Bounded(minimum(plain(a), plain(b)), a.either(b)); }
OPTIM8_DEVICE Bounded absolute(Bounded a) { return Bounded(absolute(a.x), a.bounds, a.scaled); }
OPTIM8_DEVICE bool operator<(Bounded a, Bounded b) { return plain(a) < plain(b); }
OPTIM8_DEVICE bool operator>(Bounded a, Bounded b) { return plain(a) > plain(b); }
OPTIM8_DEVICE Bounded select(bool condition, Bounded a, Bounded b) {
    return Bounded(condition ? plain(a) : plain(b), a.either(b));
}
// Where `one` stands in a register, one instruction gives it the sign.
OPTIM8_DEVICE Bounded sign(Bounded a) { return Bounded(sign_of(a.x, a.bounds->one), a.bounds); }
OPTIM8_DEVICE Bounded square_root(Bounded a) {
    const float root = scaled_root(plain(a));
    a.bounds->root.add(root);
    return Bounded(root, a.bounds, true);
}
OPTIM8_DEVICE Bounded reciprocal(Bounded a) { return Bounded(reciprocal(Quick(plain(a))).x, a.bounds); }

static_assert(Vocabulary<Bounded>::complete);

// All values that a number may have, whatever the lane's values are. `sound` is false where Bounded might give other
// bits, or its bounds might hold without reason. Rounding keeps the order of numbers, so that the results of ends are
// the ends of results.
struct Range {
    float least, most;
    bool sound, constant, scaled;  // `scaled`: as of Bounded
    Range() = default;
    OPTIM8_DEVICE explicit Range(float x) : least(x), most(x), sound(true), constant(true), scaled(false) {}
    OPTIM8_DEVICE Range(float least, float most, bool sound, bool scaled = false)
        : least(least), most(most), sound(sound), constant(false), scaled(scaled) {}
    // With one more value; anything, where that is not a number.
    OPTIM8_DEVICE void add(float x) {
        const bool number = x == x;
        least = number ? minimum(x, least) : -float_of(inf_bits);
        most = number ? maximum(x, most) : float_of(inf_bits);
    }
    OPTIM8_DEVICE bool is_divisor() const { return least >= smallest_normal && most < 0x1p126f; }
};

OPTIM8_DEVICE Range anything(bool sound) { return Range(-float_of(inf_bits), float_of(inf_bits), sound); }
OPTIM8_DEVICE Range fma(Range a, Range b, Range c) {
    // A constant that is scaled may not be rounded.
    const bool exact = !(a.scaled && b.constant) || fabsf(b.least) >= 0x1p-90f;
    Range of(float_of(inf_bits), -float_of(inf_bits), a.sound && b.sound && c.sound && exact);
    const float ends[3][2] = {{a.least, a.most}, {b.least, b.most}, {c.least, c.most}};
#pragma unroll
    for (int i = 0; i < 8; ++i) of.add(fma(ends[0][i & 1], ends[1][i >> 1 & 1], ends[2][i >> 2]));
    return of;
}
OPTIM8_DEVICE Range operator*(Range a, Range b) { return fma(a, b, Range(-0.0f)); }
OPTIM8_DEVICE Range operator+(Range a, Range b) { return fma(a, Range(1.0f), b); }
OPTIM8_DEVICE Range operator-(Range a) { return Range(-a.most, -a.least, a.sound); }
OPTIM8_DEVICE Range operator-(Range a, Range b) { return a + -b; }
OPTIM8_DEVICE Range maximum(Range a, Range b) {
    if (b.constant && b.least == smallest_normal) {
        a.sound = a.sound && a.is_divisor();
        return a;
    }
    return anything(a.sound && b.sound);
}
OPTIM8_DEVICE Range minimum(Range a, Range b) { return anything(a.sound && b.sound); }
OPTIM8_DEVICE Range absolute(Range a) { return anything(a.sound); }
OPTIM8_DEVICE QuickCondition operator<(Range a, Range b) { return {false, a.sound && b.sound}; }
OPTIM8_DEVICE QuickCondition operator>(Range a, Range b) { return {false, a.sound && b.sound}; }
OPTIM8_DEVICE Range select(QuickCondition condition, Range a, Range b) {
    return anything(condition.in_range && a.sound && b.sound);
}
OPTIM8_DEVICE Range sign(Range a) { return Range(-1.0f, 1.0f, a.sound); }
OPTIM8_DEVICE Range square_root(Range a) { return Range(0.0f, most_root, a.sound, true); }
OPTIM8_DEVICE Range reciprocal(Range a) { return anything(a.sound && a.is_divisor()); }

static_assert(Vocabulary<Range>::complete);

// Whether Bounded serves a rule with these scalars.
template <class Rule>
OPTIM8_DEVICE bool bounds_serve(const typename Rule::Scalars& scalars) {
    Range p = anything(true), state[state_count<Rule>];
    for (Range& s : state) s = anything(true);
    Rule::update(p, anything(true), state, scalars);
    bool sound = p.sound;
    for (const Range& s : state) sound = sound && s.sound;
    return sound;
}

OPTIM8_END
