// NEON, which every 64-bit Arm has: 4 lanes. Tables are read by TBL, which looks up bytes: a word is read by four of
// them, and the codes of 16 values are made and read together.
#pragma once

#include <arm_neon.h>

#include <utility>

#if defined(__ARM_BIG_ENDIAN)
#error "the NEON kernels take the lowest byte of a word for its first. Build for a little-endian target."
#endif

OPTIM8_BEGIN

constexpr int width = 4;
constexpr int code_group = 64;  // the more, the fewer loads of tables
constexpr int run = 16;         // values whose codes fill a vector
constexpr int run_vectors = run / width;
// The runs of a group. Each is named, since compilers would keep a loop over them, and the group in memory for it.
template <int... r>
using Runs = std::integer_sequence<int, r...>;
using AllRuns = std::make_integer_sequence<int, code_group / run>;

struct F {
    float32x4_t v;
    F() = default;
    OPTIM8_HD F(float32x4_t x) : v(x) {}
    OPTIM8_HD explicit F(float x) : v(vdupq_n_f32(x)) {}
};
struct Condition {
    uint32x4_t v;  // all bits of a lane, or none
};
struct I {
    int32x4_t v;
};
struct U {
    uint32x4_t v;
    U() = default;
    OPTIM8_HD explicit U(uint32x4_t x) : v(x) {}
    OPTIM8_HD explicit U(uint32_t x) : v(vdupq_n_u32(x)) {}
};

OPTIM8_HD F operator*(F a, F b) { return vmulq_f32(a.v, b.v); }
OPTIM8_HD F operator+(F a, F b) { return vaddq_f32(a.v, b.v); }
OPTIM8_HD F operator-(F a, F b) { return vsubq_f32(a.v, b.v); }
OPTIM8_HD F operator-(F x) { return vnegq_f32(x.v); }
OPTIM8_HD F fma(F a, F b, F c) { return vfmaq_f32(c.v, a.v, b.v); }
OPTIM8_HD F square_root(F x) { return vsqrtq_f32(x.v); }
OPTIM8_HD F reciprocal(F x) { return vdivq_f32(vdupq_n_f32(1.0f), x.v); }
OPTIM8_HD Condition operator<(F a, F b) { return Condition{vcltq_f32(a.v, b.v)}; }
OPTIM8_HD Condition operator>(F a, F b) { return Condition{vcgtq_f32(a.v, b.v)}; }
OPTIM8_HD F select(Condition condition, F a, F b) { return vbslq_f32(condition.v, a.v, b.v); }
// FMAX and FMIN give a NaN for a NaN, and tell the zeros apart.
OPTIM8_HD F maximum(F a, F b) { return select(a > b, a, b); }
OPTIM8_HD F minimum(F a, F b) { return select(a < b, a, b); }
OPTIM8_HD F absolute(F x) { return vabsq_f32(x.v); }
OPTIM8_HD F sign(F x) {
    const uint32x4_t moves = vcagtq_f32(x.v, vdupq_n_f32(0.0f));  // by magnitude, and not for NaN
    const float32x4_t with_sign = vbslq_f32(vdupq_n_u32(~abs_mask), x.v, vdupq_n_f32(1.0f));
    return vreinterpretq_f32_u32(vandq_u32(moves, vreinterpretq_u32_f32(with_sign)));
}
OPTIM8_HD U bits_of(F x) { return U(vreinterpretq_u32_f32(x.v)); }
OPTIM8_HD U magnitude_bits(F x) { return bits_of(absolute(x)); }
OPTIM8_HD U maximum(U a, U b) { return U(vmaxq_u32(a.v, b.v)); }
OPTIM8_HD uint32_t reduce_max(U x) { return vmaxvq_u32(x.v); }
OPTIM8_HD I truncate(F x) { return I{vcvtq_s32_f32(x.v)}; }
OPTIM8_HD I minimum(I a, I b) { return I{vminq_s32(a.v, b.v)}; }

OPTIM8_HD F load(const float* from) { return vld1q_f32(from); }
OPTIM8_HD F load(const bfloat16* from) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(from)), 16));
}
OPTIM8_HD F load(const float16* from) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(from))));
}
OPTIM8_HD void store(float* to, F x) { vst1q_f32(to, x.v); }
OPTIM8_HD void store(bfloat16* to, F x) {
    const uint32x4_t bits = bits_of(x).v;
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t number = vceqq_f32(x.v, x.v);
    const uint32x4_t added = vbslq_u32(number, vaddq_u32(bits, odd), vdupq_n_u32(0x7fc00000));
    vst1_u16(reinterpret_cast<uint16_t*>(to), vaddhn_u32(added, vdupq_n_u32(0x7fff)));
}
OPTIM8_HD void store(float16* to, F x) {
    vst1_u16(reinterpret_cast<uint16_t*>(to), vreinterpret_u16_f16(vcvt_f16_f32(x.v)));
}

// The smaller and the larger of numbers that are neither NaN nor both zeros; of a quiet NaN and a number the latter.
OPTIM8_HD F smaller(F a, F b) { return vminnmq_f32(a.v, b.v); }
OPTIM8_HD F larger(F a, F b) { return vmaxnmq_f32(a.v, b.v); }

OPTIM8_HD uint8x16_t bytes_of(uint32x4_t x) { return vreinterpretq_u8_u32(x); }
OPTIM8_HD uint8x16_t bytes_of(F x) { return vreinterpretq_u8_f32(x.v); }

// Byte `which` of every lane of four vectors.
template <int which>
OPTIM8_HD uint8x16_t gather_bytes(const uint32x4_t (&x)[run_vectors]) {
    const auto halves = [](uint32x4_t a, uint32x4_t b) {
        const uint16x8_t first = vreinterpretq_u16_u32(a), second = vreinterpretq_u16_u32(b);
        return vreinterpretq_u8_u16(which / 2 == 0 ? vuzp1q_u16(first, second) : vuzp2q_u16(first, second));
    };
    const uint8x16_t low = halves(x[0], x[1]), high = halves(x[2], x[3]);
    return which % 2 == 0 ? vuzp1q_u8(low, high) : vuzp2q_u8(low, high);
}
// Vectors whose lanes have these bytes, from the lowest.
OPTIM8_HD void scatter_bytes(const uint8x16_t (&byte)[4], F* out) {
    const auto words = [](uint8x16_t a, uint8x16_t b) { return vreinterpretq_u16_u8(vzip1q_u8(a, b)); };
    const auto words_above = [](uint8x16_t a, uint8x16_t b) { return vreinterpretq_u16_u8(vzip2q_u8(a, b)); };
    const uint16x8_t low01 = words(byte[0], byte[1]), high01 = words_above(byte[0], byte[1]);
    const uint16x8_t low23 = words(byte[2], byte[3]), high23 = words_above(byte[2], byte[3]);
    out[0] = vreinterpretq_f32_u16(vzip1q_u16(low01, low23));
    out[1] = vreinterpretq_f32_u16(vzip2q_u16(low01, low23));
    out[2] = vreinterpretq_f32_u16(vzip1q_u16(high01, high23));
    out[3] = vreinterpretq_f32_u16(vzip2q_u16(high01, high23));
}

// Where TBL finds the bytes of the words `place` of a table that begins with word `first`.
OPTIM8_HD uint8x16_t byte_places(uint32x4_t place, int first = 0) {
    const uint32_t of_first = 0x03020100u - 0x04040404u * static_cast<uint32_t>(first);
    return bytes_of(vaddq_u32(vmulq_n_u32(place, 0x04040404u), vdupq_n_u32(of_first)));
}
using Table8 = uint8x16x2_t;
OPTIM8_HD Table8 table_of(const void* low, const void* high) {
    return {{vld1q_u8(static_cast<const uint8_t*>(low)), vld1q_u8(static_cast<const uint8_t*>(high))}};
}
OPTIM8_HD F pick(Table8 table, uint8x16_t places) { return vreinterpretq_f32_u8(vqtbl2q_u8(table, places)); }

// As many bytes as TBL looks up at once: a quarter of a plane, or a table of 16 words.
OPTIM8_HD uint8x16x4_t quarter(const uint8_t* from) { return vld1q_u8_x4(from); }

OPTIM8_HD uint8x16x4_t next_quarter(const uint8_t*& plane, int step) {
    const uint8x16x4_t found = quarter(plane);
    plane += step;
    __asm__("" : "+r"(plane));  // else compilers add for each load anew what a load adds by itself
    return found;
}
// Byte by byte of the values, so that a quarter of a plane is in registers for all codes of the group. Compilers would
// load all planes first, which are more than there are registers, and spill them: what an empty `asm` takes is made
// before it, and what it may have changed is used after it. No instruction comes of it.
template <Code code>
OPTIM8_HD void decode_group(const uint8_t* codes, F (&out)[code_group / width]) {
    constexpr int runs = code_group / run, zero = zero_code_of(code);
    // With a sign, the magnitudes from the smallest one on; 0 comes before them.
    constexpr int first = is_signed(code) ? zero + 1 : 0;
    constexpr int quarters = (code_size - first) / 64;
    const uint8_t* plane = PlanesOf<code>::all.byte[0] + first;
    uint8x16_t read[runs], place[runs], byte[runs][4];
    for (int r = 0; r < runs; ++r) {
        place[r] = read[r] = vld1q_u8(codes + r * run);
        if (is_signed(code)) place[r] = vsubq_u8(vabdq_u8(read[r], vdupq_n_u8(zero)), vdupq_n_u8(1));
        __asm__("" : "+w"(place[r]));
    }
    for (int b = 0; b < 4; ++b) {
        if (b > 0)
            for (int r = 0; r < runs; ++r) __asm__ volatile("" : "+w"(byte[r][b - 1]) : : "memory");
        // What is beyond a table gives 0 by TBL, and what was there by TBX.
        const uint8x16x4_t lowest = next_quarter(plane, quarters > 1 ? 64 : code_size);
        for (int r = 0; r < runs; ++r) byte[r][b] = vqtbl4q_u8(lowest, place[r]);
        for (int q = 1; q < quarters; ++q) {
            const bool is_last = q == quarters - 1;
            const uint8x16x4_t next = next_quarter(plane, is_last ? code_size - 64 * q : 64);
            const uint8x16_t before = vdupq_n_u8(static_cast<uint8_t>(64 * q));
            for (int r = 0; r < runs; ++r) byte[r][b] = vqtbx4q_u8(byte[r][b], next, vsubq_u8(place[r], before));
        }
    }
    for (int r = 0; r < runs; ++r) {
        if (is_signed(code)) byte[r][3] = vsliq_n_u8(byte[r][3], vcltq_u8(read[r], vdupq_n_u8(zero)), 7);
        scatter_bytes(byte[r], out + r * run_vectors);
    }
}

// Lines by zone, from zone 0.
struct Lines8 {
    float threshold[8], slope[8], offset[8];
    int32_t last[8];
};
constexpr Lines8 make_lines(const CodeTables& t) {
    Lines8 made{};
    for (int z = 0; z <= decades; ++z) {
        made.threshold[z] = z < decades ? t.threshold[z] : __builtin_inff();
        made.slope[z] = t.line[z].slope;
        made.offset[z] = t.line[z].offset;
        made.last[z] = t.line[z].last;
    }
    return made;
}
template <Code code>
struct LinesOf {
    static constexpr Lines8 all = make_lines(Tables<code>::all);
};

// All bits of a byte for each negative value of a run, and for -0.
OPTIM8_HD uint8x16_t negative_bytes(const F* x) {
    const uint32x4_t bits[run_vectors] = {bits_of(x[0]).v, bits_of(x[1]).v, bits_of(x[2]).v, bits_of(x[3]).v};
    return vcltzq_s8(vreinterpretq_s8_u8(gather_bytes<3>(bits)));
}
// The bits of x as a byte: 0 where x is not positive, 255 where they are more. The bits of a positive x, as an integer,
// are no less than its index: if few, x is subnormal, at most bits * 2^-23 of absmax.
OPTIM8_HD uint8x16_t positive_bytes(const F* x) {
    const auto half = [](F a, F b) {
        const uint16x4_t low = vqmovun_s32(vreinterpretq_s32_f32(a.v));
        return vqmovn_u16(vqmovun_high_s32(low, vreinterpretq_s32_f32(b.v)));
    };
    return vcombine_u8(half(x[0], x[1]), half(x[2], x[3]));
}

template <Code code>
OPTIM8_HD void encode_run(const F* x, float reciprocal, uint8_t* codes) {
    constexpr int n = run_vectors;
    const Lines8& t = LinesOf<code>::all;
    const ZoneTables& rule = ZonesOf<code>::all;
    static_assert(ZonesOf<code>::all.factor % 2 == 0);
    const Table8 threshold = table_of(t.threshold, t.threshold + 4), slope = table_of(t.slope, t.slope + 4);
    const Table8 offset = table_of(t.offset, t.offset + 4), last = table_of(t.last, t.last + 4);
    // The upper half of each lane times `factor`, of which SQDMULH has the upper half; and nothing of the lower one.
    const int16x8_t factor = vreinterpretq_s16_u32(vdupq_n_u32(static_cast<uint32_t>(rule.factor / 2) << 16));
    const F with(reciprocal), lowest(rule.lowest);
    uint32x4_t index[n];
    for (int j = 0; j < n; ++j) {
        F y = x[j] * with;
        if (is_signed(code)) y = absolute(y);
        y = larger(y, lowest);  // a product is a quiet NaN, or none
        const int16x8_t found = vqdmulhq_s16(vreinterpretq_s16_f32(y.v), factor);
        uint8x16_t places = byte_places(vshrq_n_u32(vreinterpretq_u32_s16(found), 16), rule.first);
        const uint32x4_t above = vcgeq_f32(y.v, pick(threshold, places).v);
        places = vaddq_u8(places, vandq_u8(bytes_of(above), vdupq_n_u8(4)));
        const I lasts{vreinterpretq_s32_f32(pick(last, places).v)};
        index[j] = vreinterpretq_u32_s32(nearest_on_line(y, pick(slope, places), pick(offset, places), lasts).v);
    }
    uint8x16_t out = gather_bytes<0>(index);
    if (is_signed(code)) {
        const uint8x16_t middle = vdupq_n_u8(zero_code_of(code));
        out = vbslq_u8(negative_bytes(x), vqsubq_u8(middle, out), vaddq_u8(middle, out));
    }
    if (code == Code::Positive) out = vminq_u8(out, positive_bytes(x));
    vst1q_u8(codes, out);
}

template <Code code, int... r>
OPTIM8_HD void encode_runs(const F* x, float reciprocal, uint8_t* codes, Runs<r...>) {
    (encode_run<code>(x + r * run_vectors, reciprocal, codes + r * run), ...);
}
template <Code code>
OPTIM8_HD void encode_group(const F (&x)[code_group / width], float reciprocal, uint8_t* codes) {
    encode_runs<code>(x, reciprocal, codes, AllRuns{});
}

// The lines of dithered rounding at quotients, least_line of core/dither.h, and the last values of their zones.
template <Code code>
struct DitherLines {
    static constexpr int first_zone = lowest_binade / binades_of_zone;
    static_assert(lowest_binade % binades_of_zone == 0 && first_zone % 8 == 4, "the upper half of a table comes first");
    static_assert(binades_of_zone == 3, "a third, rounded down, of every exponent");
    Table8 slope, offset;
    uint8x16_t last;
    F with, lowest;

    OPTIM8_HD DitherLines(float reciprocal, float least)
        : slope(table_of(DitherZonesOf<code>::all.slope + 4, DitherZonesOf<code>::all.slope)),
          offset(table_of(DitherZonesOf<code>::all.offset + 4, DitherZonesOf<code>::all.offset)),
          last(vaddq_u8(vld1q_u8(DitherZonesOf<code>::all.last), vdupq_n_u8(zero_code_of(code)))),
          with(reciprocal),
          lowest(least) {}

    OPTIM8_HD F at(F x, uint32x4_t& zone) const {
        F y = x * with;
        if (is_signed(code)) y = absolute(y);
        const F clamped = larger(y, lowest);
        if (!is_signed(code)) y = clamped;
        const int16x8_t exponent = vreinterpretq_s16_u32(vshrq_n_u32(bits_of(clamped).v, 23));
        zone = vreinterpretq_u32_s16(vqdmulhq_n_s16(exponent, 10923));  // 2^15 / 3, rounded up
        const uint8x16_t places = byte_places(zone, first_zone);
        const F line = fma(y, pick(slope, places), pick(offset, places));
        return smaller(line, smaller(fma(line, F(third), F(after_third)), fma(line, F(fifth), F(after_fifth))));
    }
    OPTIM8_HD uint8x16_t last_of(const uint32x4_t (&zone)[run_vectors]) const {
        return vqtbl1q_u8(last, vandq_u8(gather_bytes<0>(zone), vdupq_n_u8(15)));
    }
};

template <int state>
OPTIM8_HD uint16x8_t element_dither(int at) {
    return vreinterpretq_u16_u32(vld1q_u32(ElementDitherOf<state>::all.of_element + at));
}

// Bytes are added modulo 2^8.
template <Code code, int state>
OPTIM8_HD void encode_run_dithered(const DitherLines<code>& lines, uint16x8_t base, const F* x, int at,
                                   uint8_t* codes) {
    uint32x4_t fixed[run_vectors], zone[run_vectors];
    for (int j = 0; j < run_vectors; ++j) {
        const F line = lines.at(x[j], zone[j]);
        const uint16x8_t u = vaddq_u16(base, element_dither<state>(at + j * width));
        fixed[j] = vaddq_u32(bits_of(line).v, vreinterpretq_u32_u16(u));
    }
    uint8x16_t out = vaddq_u8(lines.last_of(zone), gather_bytes<2>(fixed));
    if (is_signed(code)) {
        // Codes of x and -x add up to 254.
        const uint8x16_t negative = negative_bytes(x);
        out = vaddq_u8(veorq_u8(out, negative), negative);
    } else {
        out = vminq_u8(vminq_u8(out, vdupq_n_u8(code_size - 2)), positive_bytes(x));
    }
    vst1q_u8(codes, out);
}
template <Code code, int state, int... r>
OPTIM8_HD void encode_runs_dithered(const F* x, float reciprocal, uint32_t start, int at, uint8_t* codes, Runs<r...>) {
    const DitherLines<code> lines(reciprocal, DitherTablesOf<code>::all.lowest);
    const uint16x8_t base = vreinterpretq_u16_u32(vdupq_n_u32(dither_base(start)));
    (encode_run_dithered<code, state>(lines, base, x + r * run_vectors, at + r * run, codes + r * run), ...);
}
template <Code code, int state>
OPTIM8_HD void encode_group_dithered(const F (&x)[code_group / width], float reciprocal, uint32_t start, int at,
                                     uint8_t* codes) {
    encode_runs_dithered<code, state>(x, reciprocal, start, at, codes, AllRuns{});
}

template <Code code>
OPTIM8_HD void decode16_group(const uint8_t* codes, const uint8_t* low, F (&out)[code_group / width]) {
    static_assert(sums_tell_pieces<code>(), "the sum tells the pieces apart");
    const PiecesBySum& t = PiecesBySumOf<code>::all;
    const uint8x16x4_t slope = quarter(reinterpret_cast<const uint8_t*>(t.slope));
    const uint8x16x4_t offset = quarter(reinterpret_cast<const uint8_t*>(t.offset));
    const uint16x4_t zero = vdup_n_u16(zero16_of(code));
    for (int i = 0; i < code_group / width; i += 2) {
        const uint8x8_t upper = vld1_u8(codes + i * width), lower = vld1_u8(low + i * width);
        const uint16x8_t numbers = vorrq_u16(vshll_n_u8(upper, 8), vmovl_u8(lower));
        for (int j = 0; j < 2; ++j) {
            const uint16x4_t number = j == 0 ? vget_low_u16(numbers) : vget_high_u16(numbers);
            const uint32x4_t place = vsubl_u16(number, zero);
            const F position = vcvtq_f32_u32(vabdl_u16(number, zero));
            const F moved =
                is_signed(code) ? larger(position, F(Pieces<code>::least)) : position + F(Pieces<code>::shift);
            const F next = position + F(Pieces<code>::shift + 256.0f);
            const uint32x4_t sum = vsraq_n_u32(vshrq_n_u32(bits_of(moved).v, 23), bits_of(next).v, 23);
            const uint8x16_t places = byte_places(vandq_u32(sum, vdupq_n_u32(15)));
            const auto line = [&](const uint8x16x4_t& table) {
                return F(vreinterpretq_f32_u8(vqtbl4q_u8(table, places)));
            };
            const F value = fma(position, line(slope), line(offset));
            out[i + j] = is_signed(code) ? F(vbslq_f32(vdupq_n_u32(~abs_mask), vreinterpretq_f32_u32(place), value.v))
                                         : larger(value, F(0.0f));
        }
    }
}

template <Code code, int state, Rounding rounding>
OPTIM8_HD void encode16_run(const DitherLines<code>& lines, uint32_t start, const F* x, int at, uint8_t* codes,
                            uint8_t* low) {
    const uint16x8_t first = vreinterpretq_u16_u32(vdupq_n_u32(start >> 16));
    constexpr uint32_t u_and_half = (rounding == Rounding::Nearest ? u_of_nearest >> 24 : 0u) + half_cell;
    const uint32x4_t base = vdupq_n_u32(u_and_half - fixed_point_bits);
    const uint8x16_t half = vdupq_n_u8(middle_low);
    uint32x4_t fixed[run_vectors], zone[run_vectors];
    for (int j = 0; j < run_vectors; ++j) {
        const F line = lines.at(x[j], zone[j]);
        uint32x4_t added = base;
        if (rounding == Rounding::Dithered) {
            const uint16x8_t u = vaddq_u16(first, element_dither<state>(at + j * width));
            added = vsraq_n_u32(base, vreinterpretq_u32_u16(u), 8);
        }
        fixed[j] = vaddq_u32(bits_of(line).v, added);
    }
    uint8x16_t upper = vaddq_u8(lines.last_of(zone), gather_bytes<2>(fixed)), lower = gather_bytes<1>(fixed);
    if (is_signed(code)) {
        // The number of -x is 0xff00 less that of x: a byte below borrows from the one above.
        const uint8x16_t negative = negative_bytes(x);
        const uint8x16_t borrows = vandq_u8(vtstq_u8(lower, lower), negative);
        upper = vaddq_u8(veorq_u8(upper, negative), borrows);  // 0xff less it
        lower = vsubq_u8(veorq_u8(lower, negative), negative);
    } else {
        const uint8x16_t most = vdupq_n_u8(code_size - 2), zeros = vceqzq_u8(positive_bytes(x));
        lower = vbslq_u8(vcgeq_u8(upper, most), vminq_u8(lower, half), lower);
        lower = vbslq_u8(zeros, half, lower);
        upper = vbicq_u8(vminq_u8(upper, most), zeros);
    }
    vst1q_u8(codes, upper);
    vst1q_u8(low, lower);
}
template <Code code, int state, Rounding rounding, int... r>
OPTIM8_HD void encode16_runs(const F* x, float reciprocal, uint32_t start, int at, uint8_t* codes, uint8_t* low,
                             Runs<r...>) {
    const DitherLines<code> lines(reciprocal, DitherTablesOf<code>::all.lowest16);
    (encode16_run<code, state, rounding>(lines, start, x + r * run_vectors, at + r * run, codes + r * run,
                                         low + r * run),
     ...);
}
template <Code code, int state, Rounding rounding>
OPTIM8_HD void encode16_group(const F (&x)[code_group / width], float reciprocal, uint32_t start, int at,
                              uint8_t* codes, uint8_t* low) {
    encode16_runs<code, state, rounding>(x, reciprocal, start, at, codes, low, AllRuns{});
}

OPTIM8_END
