// AVX2 with FMA and F16C: 8 lanes. Decades are found by a multiplication and one compare, their lines by 8-entry
// permutes.
#pragma once

#include <immintrin.h>

OPTIM8_BEGIN

constexpr int width = 8;
constexpr int code_group = 32;  // more would not fit the 16 registers

struct F {
    __m256 v;
    F() = default;
    OPTIM8_HD F(__m256 x) : v(x) {}
    OPTIM8_HD explicit F(float x) : v(_mm256_set1_ps(x)) {}
};
struct Condition {
    __m256 v;  // all bits of a lane, or none
};
struct I {
    __m256i v;
};
struct U {
    __m256i v;
    U() = default;
    OPTIM8_HD explicit U(__m256i x) : v(x) {}
    OPTIM8_HD explicit U(uint32_t x) : v(_mm256_set1_epi32(static_cast<int>(x))) {}
};

OPTIM8_HD F operator*(F a, F b) { return _mm256_mul_ps(a.v, b.v); }
OPTIM8_HD F operator+(F a, F b) { return _mm256_add_ps(a.v, b.v); }
OPTIM8_HD F operator-(F a, F b) { return _mm256_sub_ps(a.v, b.v); }
OPTIM8_HD F operator-(F x) { return _mm256_xor_ps(x.v, _mm256_set1_ps(-0.0f)); }
OPTIM8_HD F fma(F a, F b, F c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
OPTIM8_HD F square_root(F x) { return _mm256_sqrt_ps(x.v); }
OPTIM8_HD F reciprocal(F x) { return _mm256_div_ps(_mm256_set1_ps(1.0f), x.v); }
OPTIM8_HD F maximum(F a, F b) { return _mm256_max_ps(a.v, b.v); }
OPTIM8_HD F minimum(F a, F b) { return _mm256_min_ps(a.v, b.v); }
OPTIM8_HD F absolute(F x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.v); }
OPTIM8_HD Condition operator<(F a, F b) { return Condition{_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
OPTIM8_HD Condition operator>(F a, F b) { return Condition{_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
OPTIM8_HD F select(Condition condition, F a, F b) { return _mm256_blendv_ps(b.v, a.v, condition.v); }
OPTIM8_HD F sign(F x) {
    const __m256 moves = _mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_NEQ_OQ);
    const __m256 with_sign = _mm256_or_ps(_mm256_and_ps(x.v, _mm256_set1_ps(-0.0f)), _mm256_set1_ps(1.0f));
    return _mm256_and_ps(moves, with_sign);
}
OPTIM8_HD U bits_of(F x) { return U(_mm256_castps_si256(x.v)); }
OPTIM8_HD U magnitude_bits(F x) {
    return U(_mm256_and_si256(_mm256_castps_si256(x.v), _mm256_set1_epi32(static_cast<int>(abs_mask))));
}
OPTIM8_HD U maximum(U a, U b) { return U(_mm256_max_epu32(a.v, b.v)); }
OPTIM8_HD uint32_t reduce_max(U x) {
    __m128i m = _mm_max_epu32(_mm256_castsi256_si128(x.v), _mm256_extracti128_si256(x.v, 1));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
}
OPTIM8_HD I truncate(F x) { return I{_mm256_cvttps_epi32(x.v)}; }
OPTIM8_HD I minimum(I a, I b) { return I{_mm256_min_epi32(a.v, b.v)}; }

OPTIM8_HD F load(const float* from) { return _mm256_loadu_ps(from); }
OPTIM8_HD F load(const bfloat16* from) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
OPTIM8_HD F load(const float16* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
OPTIM8_HD void store(float* to, F x) { _mm256_storeu_ps(to, x.v); }
// The bfloat16 nearest to a number, as a word. Not of a NaN.
OPTIM8_HD __m256i to_bfloat16(F x) {
    const __m256i bits = _mm256_castps_si256(x.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff)), 16);
}
OPTIM8_HD void store(bfloat16* to, F x) {
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
    const __m256i rounded = _mm256_blendv_epi8(to_bfloat16(x), _mm256_set1_epi32(0x7fc0), nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}
OPTIM8_HD void store(float16* to, F x) {
    const __m128i half = _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), half);
}

OPTIM8_HD void store_pair(bfloat16* to, F a, F b) {
    if (__builtin_expect(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_UNORD_Q)) != 0, 0)) {
        store(to, a);
        store(to + width, b);
    } else {
        const __m256i packed = _mm256_packus_epi32(to_bfloat16(a), to_bfloat16(b));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(packed, 0xd8));
    }
}

template <Code code>
OPTIM8_HD void decode_group(const uint8_t* codes, F (&out)[code_group / width]) {
    // Eight loads and inserts: a gather is a long microcode sequence on many machines. As integers, because only then
    // does GCC make a load and an insert one instruction.
    const float* table = Tables<code>::all.value;
    for (int j = 0; j < code_group / width; ++j) {
        uint64_t c;
        std::memcpy(&c, codes + j * width, sizeof c);
        const auto value = [&](int k) {
            int32_t bits;
            std::memcpy(&bits, table + (c >> (8 * k) & 255), sizeof bits);
            return bits;
        };
        const auto four = [&](int k) {
            __m128i x = _mm_cvtsi32_si128(value(k));
            x = _mm_insert_epi32(x, value(k + 1), 1);
            x = _mm_insert_epi32(x, value(k + 2), 2);
            return _mm_insert_epi32(x, value(k + 3), 3);
        };
        out[j] = _mm256_castsi256_ps(_mm256_set_m128i(four(4), four(0)));
    }
}

OPTIM8_HD __m256i pick(const int32_t (&table)[8], __m256i zone) {
    return _mm256_permutevar8x32_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(table)), zone);
}
OPTIM8_HD F pick(const float (&table)[8], __m256i zone) {
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), zone);
}

// Four vectors of numbers as bytes, in an order that store_packed undoes; with signed or unsigned saturation.
OPTIM8_HD __m256i pack(__m256i a, __m256i b, __m256i c, __m256i d) {
    return _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
}
OPTIM8_HD __m256i pack_unsigned(__m256i a, __m256i b, __m256i c, __m256i d) {
    return _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
}
OPTIM8_HD void store_packed(__m256i packed, uint8_t* codes) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), _mm256_permutevar8x32_epi32(packed, order));
}

// The low bits of weights (core/weight.h), of two bytes or of one.
OPTIM8_HD __m256i load_low(const int16_t* from) {
    return _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
OPTIM8_HD __m256i load_low(const uint8_t* from) {
    return _mm256_slli_epi32(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))), 8);
}
// Halves of two vectors that stand alone in their words.
OPTIM8_HD void store_halves(__m256i a, __m256i b, void* to) {
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8);
    _mm256_storeu_si256(static_cast<__m256i*>(to), packed);
}
// A group of weights from bfloat16 parameters and their low bits. False where some would change a sign.
template <class Low>
OPTIM8_HD bool join_weights(const bfloat16* param, const Low* low, F (&x)[code_group / width]) {
    __m256i differ = _mm256_setzero_si256();
    for (int j = 0; j < code_group / width; ++j) {
        const __m256i upper = _mm256_castps_si256(load(param + j * width).v);
        const __m256i joined = _mm256_add_epi32(upper, load_low(low + j * width));
        differ = _mm256_or_si256(differ, _mm256_xor_si256(upper, joined));
        x[j] = _mm256_castsi256_ps(joined);
    }
    return _mm256_movemask_ps(_mm256_castsi256_ps(differ)) == 0;
}
// What is kept of a group of weights. `start`: the dither of the first element of their block; `at`: where the group
// begins there. False, with nothing stored, where one is NaN.
template <Weight kind>
OPTIM8_HD bool part_weights(const F (&x)[code_group / width], uint32_t start, int at, bfloat16* param,
                            unsigned char* low) {
    const __m256 unordered =
        _mm256_or_ps(_mm256_cmp_ps(x[0].v, x[1].v, _CMP_UNORD_Q), _mm256_cmp_ps(x[2].v, x[3].v, _CMP_UNORD_Q));
    if (__builtin_expect(_mm256_movemask_ps(unordered) != 0, 0)) return false;
    const __m256i first = _mm256_set1_epi32(static_cast<int>(start >> 16)), zero = _mm256_setzero_si256();
    __m256i weight[4];
    for (int j = 0; j < 4; ++j) {
        weight[j] = _mm256_castps_si256(x[j].v);
        if (kind != Weight::Bits32) {
            const uint32_t* elements = ElementDitherOf<dither_of_param>::all.of_element + at + j * width;
            const __m256i u = _mm256_add_epi16(first, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(elements)));
            weight[j] = _mm256_add_epi32(weight[j], kind == Weight::Bits24 ? _mm256_srli_epi32(u, 8) : u);
        }
    }
    const auto upper = [&](int j) {
        // What keep_weight takes away for the dither comes back as the parameter is rounded.
        const __m256i rounded =
            kind == Weight::Dithered ? weight[j] : _mm256_add_epi32(weight[j], _mm256_set1_epi32(0x8000));
        return _mm256_srli_epi32(rounded, 16);
    };
    const auto lower = [&](int j) { return _mm256_blend_epi16(weight[j], zero, 0xaa); };
    const auto second = [&](int j) {
        return _mm256_and_si256(_mm256_srli_epi32(weight[j], 8), _mm256_set1_epi32(255));
    };
    for (int j = 0; j < 4; j += 2) {
        store_halves(upper(j), upper(j + 1), param + j * width);
        if (kind == Weight::Bits32) store_halves(lower(j), lower(j + 1), low + 2 * j * width);
    }
    if (kind == Weight::Bits24) store_packed(pack_unsigned(second(0), second(1), second(2), second(3)), low);
    return true;
}

// Each operation stands for all vectors before the next one, so that neighbouring instructions wait for different
// things and a table is read from memory once.
template <Code code>
OPTIM8_HD void encode_group(const F (&x)[code_group / width], float reciprocal, uint8_t* codes) {
    constexpr int n = code_group / width;
    static_assert(n == 4, "one packed vector of codes");
    const ZoneTables& t = ZonesOf<code>::all;
    const __m256 magnitude_mask = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(abs_mask)));
    const __m256i factor = _mm256_set1_epi32(t.factor << 16);
    const F with(reciprocal), lowest(t.lowest);
    F y[n], slope[n];
    __m256i zone[n];
    I index[n];
    for (int j = 0; j < n; ++j) y[j] = x[j] * with;
    if (is_signed(code))
        for (int j = 0; j < n; ++j) y[j] = _mm256_and_ps(y[j].v, magnitude_mask);
    // The maximum gives the other operand for a NaN.
    for (int j = 0; j < n; ++j) y[j] = maximum(y[j], lowest);
    for (int j = 0; j < n; ++j) zone[j] = _mm256_mulhi_epu16(_mm256_castps_si256(y[j].v), factor);
    for (int j = 0; j < n; ++j) zone[j] = _mm256_srli_epi32(zone[j], 16);
    __m256 above[n];
    for (int j = 0; j < n; ++j) above[j] = pick(t.threshold, zone[j]).v;
    for (int j = 0; j < n; ++j) above[j] = _mm256_cmp_ps(y[j].v, above[j], _CMP_GE_OQ);
    for (int j = 0; j < n; ++j) zone[j] = _mm256_sub_epi32(zone[j], _mm256_castps_si256(above[j]));
    for (int j = 0; j < n; ++j) slope[j] = pick(t.slope, zone[j]);
    for (int j = 0; j < n; ++j)
        index[j] = nearest_on_line(y[j], slope[j], pick(t.offset, zone[j]), I{pick(t.last, zone[j])});
    for (int j = 0; j < n; ++j) {
        const __m256i bits = _mm256_castps_si256(x[j].v);
        // The quotient has the sign of x.
        if (is_signed(code)) index[j].v = _mm256_sign_epi32(index[j].v, bits);
        // 0 where x is not positive. The bits of a positive x, as an integer, are no less than its index: if few, x is
        // subnormal, at most bits * 2^-23 of absmax. Negative ones are made 0 by the packing below.
        if (code == Code::Positive) index[j] = minimum(index[j], I{bits});
    }
    __m256i low = _mm256_packs_epi32(index[0].v, index[1].v), high = _mm256_packs_epi32(index[2].v, index[3].v);
    if (is_signed(code)) {
        low = _mm256_add_epi16(low, _mm256_set1_epi16(zero_code_of(code)));
        high = _mm256_add_epi16(high, _mm256_set1_epi16(zero_code_of(code)));
    }
    store_packed(_mm256_packus_epi16(low, high), codes);
}

// Of numbers that are not negative, whose bits are in the same order, or of a negative one and one that is not. Some
// processors have more units for integers.
OPTIM8_HD F maximum_as_bits(F a, F b) {
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a.v), _mm256_castps_si256(b.v)));
}
OPTIM8_HD F minimum_as_bits(F a, F b) {
    return _mm256_castsi256_ps(_mm256_min_epi32(_mm256_castps_si256(a.v), _mm256_castps_si256(b.v)));
}

// As above. What is the same for all bytes is done with all of them at once.
template <Code code, int state>
OPTIM8_HD void encode_group_dithered(const F (&x)[code_group / width], float reciprocal, uint32_t start, int at,
                                     uint8_t* codes) {
    constexpr int n = code_group / width;
    const DitherZones& t = DitherZonesOf<code>::all;
    const __m256 magnitude_mask = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(abs_mask)));
    const F with(reciprocal), lowest(DitherTablesOf<code>::all.lowest);
    static_assert(binades_of_zone == 3, "a third, rounded down, of every exponent");
    const __m256i third_of_exponent = _mm256_set1_epi32(21846);  // 2^16 / 3, rounded up
    const __m256i* elements = reinterpret_cast<const __m256i*>(ElementDitherOf<state>::all.of_element + at);
    const __m256i base = _mm256_set1_epi32(static_cast<int>(dither_base(start)));
    F y[n], line[n];
    __m256i zone[n], index[n];
    for (int j = 0; j < n; ++j) y[j] = x[j] * with;
    if (is_signed(code))
        for (int j = 0; j < n; ++j) y[j] = _mm256_and_ps(y[j].v, magnitude_mask);
    for (int j = 0; j < n; ++j) {
        const F clamped = maximum_as_bits(y[j], lowest);
        if (!is_signed(code)) y[j] = clamped;
        zone[j] = _mm256_srli_epi32(_mm256_castps_si256(clamped.v), 23);
    }
    for (int j = 0; j < n; ++j) zone[j] = _mm256_mulhi_epu16(zone[j], third_of_exponent);
    for (int j = 0; j < n; ++j) y[j] = fma(y[j], pick(t.slope, zone[j]), pick(t.offset, zone[j]));
    for (int j = 0; j < n; ++j) line[j] = fma(y[j], F(fifth), F(after_fifth));
    for (int j = 0; j < n; ++j) line[j] = minimum_as_bits(fma(y[j], F(third), F(after_third)), line[j]);
    for (int j = 0; j < n; ++j) line[j] = minimum_as_bits(y[j], line[j]);
    for (int j = 0; j < n; ++j) index[j] = _mm256_add_epi16(base, _mm256_load_si256(elements + j));
    for (int j = 0; j < n; ++j) index[j] = _mm256_add_epi32(_mm256_castps_si256(line[j].v), index[j]);
    for (int j = 0; j < n; ++j) index[j] = _mm256_srai_epi32(index[j], 16);
    const __m256i lasts = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(t.last)));
    const __m256i last = _mm256_shuffle_epi8(lasts, pack(zone[0], zone[1], zone[2], zone[3]));
    __m256i all = _mm256_add_epi8(last, pack(index[0], index[1], index[2], index[3]));
    const auto bits = [&](int j) { return _mm256_castps_si256(x[j].v); };
    if (is_signed(code)) {
        // The sign of x, or 0.
        all = _mm256_sign_epi8(all, pack(bits(0), bits(1), bits(2), bits(3)));
        all = _mm256_add_epi8(all, _mm256_set1_epi8(zero_code_of(code)));
    } else {
        all = _mm256_min_epu8(all, _mm256_set1_epi8(static_cast<char>(code_size - 2)));
        // 0 where x is not positive, as above.
        all = _mm256_min_epu8(all, pack_unsigned(bits(0), bits(1), bits(2), bits(3)));
    }
    store_packed(all, codes);
}

// The pieces by the exponent of the position, modulo 8: where that plus 1 has the same exponent, and where not.
struct alignas(32) Pieces8 {
    float slope[2][8], offset[2][8];
};
template <Code code>
constexpr Pieces8 make_pieces() {
    Pieces8 made{};
    for (int i = 0; i < Pieces<code>::count; ++i) {
        const int lower = Pieces<code>::lower(i), between = Pieces<code>::upper(i) != lower;
        made.slope[between][lower % 8] = Decode16TablesOf<code>::all.slope[i];
        made.offset[between][lower % 8] = Decode16TablesOf<code>::all.offset[i];
    }
    return made;
}
template <Code code>
struct PiecesOf {
    static constexpr Pieces8 all = make_pieces<code>();
};
template <Code code>
constexpr bool pieces_hold() {
    for (int i = 0; i < Pieces<code>::count; ++i) {
        const int lower = Pieces<code>::lower(i), between = Pieces<code>::upper(i) != lower;
        if (PiecesOf<code>::all.slope[between][lower % 8] != Decode16TablesOf<code>::all.slope[i] ||
            PiecesOf<code>::all.offset[between][lower % 8] != Decode16TablesOf<code>::all.offset[i])
            return false;
    }
    return true;
}

template <Code code>
OPTIM8_HD void decode16_group(const uint8_t* codes, const uint8_t* low, F (&out)[code_group / width]) {
    static_assert(pieces_hold<code>(), "the exponents tell the pieces apart");
    const Pieces8& t = PiecesOf<code>::all;
    const __m256i zero = _mm256_set1_epi32(static_cast<int>(zero16_of(code)));
    const auto eight = [](const uint8_t* from) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    };
    for (int j = 0; j < code_group / width; ++j) {
        const __m256i number = _mm256_or_si256(_mm256_slli_epi32(eight(codes + j * width), 8), eight(low + j * width));
        const __m256i place = _mm256_sub_epi32(number, zero);
        const F position = _mm256_cvtepi32_ps(_mm256_abs_epi32(place));
        const F moved = is_signed(code) ? maximum(position, F(Pieces<code>::least)) : position + F(Pieces<code>::shift);
        const F next = position + F(Pieces<code>::shift + 256.0f);
        const __m256i lower = _mm256_srli_epi32(_mm256_castps_si256(moved.v), 23);
        const __m256i upper = _mm256_srli_epi32(_mm256_castps_si256(next.v), 23);
        const __m256 within = _mm256_castsi256_ps(_mm256_cmpeq_epi32(lower, upper));
        const auto line = [&](const float (&of_piece)[2][8]) {
            return F(_mm256_blendv_ps(pick(of_piece[1], lower).v, pick(of_piece[0], lower).v, within));
        };
        F value = fma(position, line(t.slope), line(t.offset));
        if (is_signed(code))
            value = _mm256_or_ps(value.v, _mm256_and_ps(_mm256_castsi256_ps(place), _mm256_set1_ps(-0.0f)));
        else
            value = maximum(value, F(0.0f));
        out[j] = value;
    }
}

template <Code code, int state, Rounding rounding>
OPTIM8_HD void encode16_group(const F (&x)[code_group / width], float reciprocal, uint32_t start, int at,
                              uint8_t* codes, uint8_t* low) {
    constexpr int n = code_group / width;
    const DitherZones& t = DitherZonesOf<code>::all;
    const F with(reciprocal), lowest(DitherTablesOf<code>::all.lowest16);
    const __m256i third_of_exponent = _mm256_set1_epi32(21846);  // 2^16 / 3, rounded up
    const __m256i* elements = reinterpret_cast<const __m256i*>(ElementDitherOf<state>::all.of_element + at);
    const __m256i first = _mm256_set1_epi32(static_cast<int>(start >> 16));
    constexpr uint32_t u_and_half = (rounding == Rounding::Nearest ? u_of_nearest >> 24 : 0u) + half_cell;
    const __m256i base = _mm256_set1_epi32(static_cast<int>(u_and_half - fixed_point_bits));
    __m256i zone[n], index[n], rest[n];
    for (int j = 0; j < n; ++j) {
        F y = is_signed(code) ? absolute(x[j] * with) : x[j] * with;
        const F clamped = maximum(y, lowest);
        if (!is_signed(code)) y = clamped;
        zone[j] = _mm256_mulhi_epu16(_mm256_srli_epi32(_mm256_castps_si256(clamped.v), 23), third_of_exponent);
        const F line = fma(y, pick(t.slope, zone[j]), pick(t.offset, zone[j]));
        const F other = minimum(fma(line, F(third), F(after_third)), fma(line, F(fifth), F(after_fifth)));
        __m256i added = base;
        if (rounding == Rounding::Dithered) {
            const __m256i u = _mm256_add_epi16(first, _mm256_load_si256(elements + j));
            added = _mm256_add_epi32(base, _mm256_srli_epi32(u, 8));
        }
        const __m256i fixed = _mm256_add_epi32(_mm256_castps_si256(minimum(line, other).v), added);
        index[j] = _mm256_srai_epi32(fixed, 16);
        rest[j] = _mm256_and_si256(_mm256_srli_epi32(fixed, 8), _mm256_set1_epi32(255));
    }
    const __m256i lasts = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(t.last)));
    const __m256i last = _mm256_shuffle_epi8(lasts, pack(zone[0], zone[1], zone[2], zone[3]));
    __m256i upper = _mm256_add_epi8(last, pack(index[0], index[1], index[2], index[3]));
    __m256i lower = pack_unsigned(rest[0], rest[1], rest[2], rest[3]);
    const auto bits = [&](int j) { return _mm256_castps_si256(x[j].v); };
    const __m256i none = _mm256_setzero_si256(), half = _mm256_set1_epi8(static_cast<char>(middle_low));
    if (is_signed(code)) {
        upper = _mm256_add_epi8(upper, _mm256_set1_epi8(zero_code_of(code)));
        // The number of -x is 0xff00 less that of x: a byte below borrows from the one above.
        const __m256i negative = _mm256_cmpgt_epi8(none, pack(bits(0), bits(1), bits(2), bits(3)));
        const __m256i borrows = _mm256_andnot_si256(_mm256_cmpeq_epi8(lower, none), negative);
        upper = _mm256_add_epi8(_mm256_xor_si256(upper, negative), borrows);  // 0xff less it
        lower = _mm256_sub_epi8(_mm256_xor_si256(lower, negative), negative);
    } else {
        const __m256i most = _mm256_set1_epi8(static_cast<char>(code_size - 2));
        const __m256i top = _mm256_cmpeq_epi8(_mm256_max_epu8(upper, most), upper);
        upper = _mm256_min_epu8(upper, most);
        lower = _mm256_blendv_epi8(lower, _mm256_min_epu8(lower, half), top);
        // 0 where x is not positive, as above.
        const __m256i zeros = _mm256_cmpeq_epi8(pack_unsigned(bits(0), bits(1), bits(2), bits(3)), none);
        upper = _mm256_andnot_si256(zeros, upper);
        lower = _mm256_blendv_epi8(lower, half, zeros);
    }
    store_packed(upper, codes);
    store_packed(lower, low);
}

OPTIM8_END
