// AVX-512: 16 lanes. Encoding reads the line of a decade by 32-entry permutes indexed with the low exponent bits. Two
// builds: with VBMI (Ice Lake, Zen 4 and later) bytes are looked up by permutes of bytes, without (Skylake-X, Cascade
// Lake) by permutes of half words and shuffles within 128 bits.
#pragma once

// GCC 12 warns of its own header's deliberately undefined operands (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

OPTIM8_BEGIN

constexpr int width = 16;
constexpr int code_group = 64;  // one vector of codes

struct F {
    __m512 v;
    F() = default;
    OPTIM8_HD F(__m512 x) : v(x) {}
    OPTIM8_HD explicit F(float x) : v(_mm512_set1_ps(x)) {}
};
struct Condition {
    __mmask16 v;
};
struct I {
    __m512i v;
};
struct U {
    __m512i v;
    U() = default;
    OPTIM8_HD explicit U(__m512i x) : v(x) {}
    OPTIM8_HD explicit U(uint32_t x) : v(_mm512_set1_epi32(static_cast<int>(x))) {}
};

OPTIM8_HD F operator*(F a, F b) { return _mm512_mul_ps(a.v, b.v); }
OPTIM8_HD F operator+(F a, F b) { return _mm512_add_ps(a.v, b.v); }
OPTIM8_HD F operator-(F a, F b) { return _mm512_sub_ps(a.v, b.v); }
OPTIM8_HD F operator-(F x) { return _mm512_xor_ps(x.v, _mm512_set1_ps(-0.0f)); }
OPTIM8_HD F fma(F a, F b, F c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
OPTIM8_HD F square_root(F x) { return _mm512_sqrt_ps(x.v); }
OPTIM8_HD F reciprocal(F x) { return _mm512_div_ps(_mm512_set1_ps(1.0f), x.v); }
OPTIM8_HD F maximum(F a, F b) { return _mm512_max_ps(a.v, b.v); }
OPTIM8_HD F minimum(F a, F b) { return _mm512_min_ps(a.v, b.v); }
OPTIM8_HD F absolute(F x) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), x.v); }
OPTIM8_HD Condition operator<(F a, F b) { return Condition{_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
OPTIM8_HD Condition operator>(F a, F b) { return Condition{_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
OPTIM8_HD F select(Condition condition, F a, F b) { return _mm512_mask_blend_ps(condition.v, b.v, a.v); }
OPTIM8_HD F sign(F x) {
    const __mmask16 moves = _mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_NEQ_OQ);
    const __m512 with_sign = _mm512_or_ps(_mm512_and_ps(x.v, _mm512_set1_ps(-0.0f)), _mm512_set1_ps(1.0f));
    return _mm512_maskz_mov_ps(moves, with_sign);
}
OPTIM8_HD U bits_of(F x) { return U(_mm512_castps_si512(x.v)); }
OPTIM8_HD U magnitude_bits(F x) {
    return U(_mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(static_cast<int>(abs_mask))));
}
OPTIM8_HD U maximum(U a, U b) { return U(_mm512_max_epu32(a.v, b.v)); }
OPTIM8_HD uint32_t reduce_max(U x) { return _mm512_reduce_max_epu32(x.v); }
OPTIM8_HD I truncate(F x) { return I{_mm512_cvttps_epi32(x.v)}; }
OPTIM8_HD I minimum(I a, I b) { return I{_mm512_min_epi32(a.v, b.v)}; }

OPTIM8_HD F load(const float* from) { return _mm512_loadu_ps(from); }
OPTIM8_HD F load(const bfloat16* from) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
OPTIM8_HD F load(const float16* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
OPTIM8_HD void store(float* to, F x) { _mm512_storeu_ps(to, x.v); }
// Rounds to bfloat16 in the upper halves. Not of a NaN.
OPTIM8_HD __m512i round_to_bfloat16(F x) {
    const __m512i bits = _mm512_castps_si512(x.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
}
OPTIM8_HD void store(bfloat16* to, F x) {
    __m512i rounded = round_to_bfloat16(x);
    const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    const __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
}
OPTIM8_HD void store(float16* to, F x) {
    const __m256i half = _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
}

struct alignas(64) Halves {
    uint16_t of_pair[2][32];
};
// Which of 32 values each half of a word takes, of the first and of the second of two vectors.
constexpr Halves make_spread() {
    Halves made{};
    for (uint16_t i = 0; i < 64; ++i) made.of_pair[i / 32][i % 32] = static_cast<uint16_t>(i / 2);
    return made;
}
// The lower halves of two vectors, and the upper ones.
constexpr Halves make_parts() {
    Halves made{};
    for (uint16_t i = 0; i < 64; ++i) made.of_pair[i / 32][i % 32] = static_cast<uint16_t>(2 * (i % 32) + i / 32);
    return made;
}
struct HalvesOf {
    static constexpr Halves spread = make_spread(), parts = make_parts();
};
OPTIM8_HD __m512i lower_halves(__m512i a, __m512i b) {
    return _mm512_permutex2var_epi16(a, _mm512_load_si512(HalvesOf::parts.of_pair[0]), b);
}
OPTIM8_HD __m512i upper_halves(__m512i a, __m512i b) {
    return _mm512_permutex2var_epi16(a, _mm512_load_si512(HalvesOf::parts.of_pair[1]), b);
}

OPTIM8_HD void load_pair(const bfloat16* from, F& a, F& b) {
    constexpr __mmask32 upper = 0xaaaaaaaau;
    const __m512i values = _mm512_loadu_si512(from);
    const auto spread = [&](int i) {
        const __m512i place = _mm512_load_si512(HalvesOf::spread.of_pair[i]);
        return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(upper, place, values));
    };
    a = spread(0);
    b = spread(1);
}
OPTIM8_HD void store_pair(bfloat16* to, F a, F b) {
    if (__builtin_expect(_mm512_cmp_ps_mask(a.v, b.v, _CMP_UNORD_Q) != 0, 0)) {
        store(to, a);
        store(to + width, b);
    } else {
        _mm512_storeu_si512(to, upper_halves(round_to_bfloat16(a), round_to_bfloat16(b)));
    }
}

OPTIM8_HD __m512i at(const void* table, int quarter) {
    return _mm512_loadu_si512(static_cast<const char*>(table) + 64 * quarter);
}

// A table of 32 bytes, twice over: permutes of bytes take six bits of index.
struct alignas(64) Bytes32 {
    uint8_t twice[64];
};
// The look-ups by bytes: decode_group, gather_bytes, and look_up by the low five bits.
constexpr int nothing = lowest_binade - 1;  // stands for the exponent of what is stored as 0
// As if transposed: four runs of 4 bytes in each of four 128-bit lanes.
OPTIM8_HD __m512i transpose_runs(__m512i x) {
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), x);
}
OPTIM8_END
#if defined(__AVX512VBMI__)
#include "cpu/kernels/bytes_vbmi.h"
#else
#include "cpu/kernels/bytes_bw.h"
#endif
OPTIM8_BEGIN

// The low bits of weights (core/weight.h), of two bytes or of one.
OPTIM8_HD __m512i load_low(const int16_t* from) {
    return _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
OPTIM8_HD __m512i load_low(const uint8_t* from) {
    return _mm512_slli_epi32(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))), 8);
}
// A group of weights from bfloat16 parameters and their low bits. False where some would change a sign.
template <class Low>
OPTIM8_HD bool join_weights(const bfloat16* param, const Low* low, F (&x)[code_group / width]) {
    __m512i differ = _mm512_setzero_si512();
    for (int j = 0; j < 4; j += 2) load_pair(param + j * width, x[j], x[j + 1]);
    for (int j = 0; j < 4; ++j) {
        const __m512i upper = _mm512_castps_si512(x[j].v);
        const __m512i joined = _mm512_add_epi32(upper, load_low(low + j * width));
        differ = _mm512_ternarylogic_epi32(differ, upper, joined, 0xf6);  // differ | (upper ^ joined)
        x[j] = _mm512_castsi512_ps(joined);
    }
    return _mm512_movepi32_mask(differ) == 0;
}
// What is kept of a group of weights. `start`: the dither of the first element of their block; `at`: where the group
// begins there. False, with nothing stored, where one is NaN.
template <Weight kind>
OPTIM8_HD bool part_weights(const F (&x)[code_group / width], uint32_t start, int at, bfloat16* param,
                            unsigned char* low) {
    const __mmask16 unordered =
        _mm512_cmp_ps_mask(x[0].v, x[1].v, _CMP_UNORD_Q) | _mm512_cmp_ps_mask(x[2].v, x[3].v, _CMP_UNORD_Q);
    if (__builtin_expect(unordered != 0, 0)) return false;
    const __m512i first = _mm512_set1_epi32(static_cast<int>(start >> 16));
    __m512i weight[4], upper[4];
    for (int j = 0; j < 4; ++j) {
        weight[j] = _mm512_castps_si512(x[j].v);
        if (kind != Weight::Bits32) {
            const uint32_t* elements = ElementDitherOf<dither_of_param>::all.of_element + at + j * width;
            const __m512i u = _mm512_add_epi16(first, _mm512_loadu_si512(elements));
            weight[j] = _mm512_add_epi32(weight[j], kind == Weight::Bits24 ? _mm512_srli_epi32(u, 8) : u);
        }
        // What keep_weight takes away for the dither comes back as the parameter is rounded.
        upper[j] = kind == Weight::Dithered ? weight[j] : _mm512_add_epi32(weight[j], _mm512_set1_epi32(0x8000));
    }
    for (int j = 0; j < 4; j += 2) {
        _mm512_storeu_si512(param + j * width, upper_halves(upper[j], upper[j + 1]));
        if (kind == Weight::Bits32) _mm512_storeu_si512(low + 2 * j * width, lower_halves(weight[j], weight[j + 1]));
    }
    if (kind == Weight::Bits24) _mm512_storeu_si512(low, gather_bytes<1>(weight[0], weight[1], weight[2], weight[3]));
    return true;
}

// By the low five bits of the exponent; 0 for `nothing`.
constexpr Bytes32 make_last_bytes(Code code) {
    const DitherTables t = make_dither_tables(code);
    Bytes32 made{};
    for (int b = lowest_binade; b < lowest_binade + zones * binades_of_zone; ++b)
        made.twice[b % 32] = made.twice[b % 32 + 32] = last_index(t, code, b);
    return made;
}
template <Code code>
struct LastBytesOf {
    static constexpr Bytes32 all = make_last_bytes(code);
};

OPTIM8_HD F pick(const float (&table)[32], __m512i zone) {
    return _mm512_permutex2var_ps(_mm512_loadu_ps(table), zone, _mm512_loadu_ps(table + 16));
}
OPTIM8_HD __m512i pick(const void* table, __m512i zone) {
    return _mm512_permutex2var_epi32(at(table, 0), zone, at(table, 1));
}

template <Code code>
OPTIM8_HD void encode_group(const F (&x)[code_group / width], float reciprocal, uint8_t* codes) {
    const CodeTables& t = Tables<code>::all;
    const __m512 tiny = _mm512_set1_ps(smallest_quotient);
    __m512i magnitude[4], quotient[4];
    for (int j = 0; j < 4; ++j) {
        const __m512 y = _mm512_mul_ps(x[j].v, _mm512_set1_ps(reciprocal));
        quotient[j] = _mm512_castps_si512(y);
        // Larger magnitude of the two, sign cleared; the other operand for a NaN.
        const __m512 clamped = is_signed(code) ? _mm512_range_ps(y, tiny, 0x0b) : _mm512_max_ps(y, tiny);
        const __m512i bits = _mm512_castps_si512(clamped);
        const __m512i carry = pick(t.carry, _mm512_srli_epi32(bits, 23));
        const __m512i zone = _mm512_srli_epi32(_mm512_add_epi32(bits, carry), 23);
        I a = nearest_on_line(F(clamped), pick(t.slope, zone), pick(t.offset, zone), I{pick(t.last, zone)});
        if (code == Code::Positive) {
            const __mmask16 positive = _mm512_cmp_ps_mask(x[j].v, _mm512_setzero_ps(), _CMP_GT_OQ);
            a.v = _mm512_maskz_mov_epi32(positive, a.v);
        }
        magnitude[j] = a.v;
    }
    __m512i index = gather_bytes<0>(magnitude[0], magnitude[1], magnitude[2], magnitude[3]);
    if (is_signed(code)) {
        const __m512i signs = gather_bytes<3>(quotient[0], quotient[1], quotient[2], quotient[3]);
        const __m512i middle = _mm512_set1_epi8(zero_code_of(code));
        const __m512i above = _mm512_add_epi8(middle, index);
        index = _mm512_mask_subs_epu8(above, _mm512_movepi8_mask(signs), middle, index);
    }
    _mm512_storeu_si512(codes, index);
}

// As above. The third byte of a fixed-point number is the integer before its point; bytes are added modulo 2^8.
template <Code code, int state>
OPTIM8_HD void encode_group_dithered(const F (&x)[code_group / width], float reciprocal, uint32_t start, int at,
                                     uint8_t* codes) {
    const DitherTables& t = DitherTablesOf<code>::all;
    const __m512 lowest = _mm512_set1_ps(t.lowest);
    const __m512i base = _mm512_set1_epi32(static_cast<int>(dither_base(start)));
    __m512i fixed[4], exponent[4];
    for (int j = 0; j < 4; ++j) {
        __m512 y = _mm512_mul_ps(x[j].v, _mm512_set1_ps(reciprocal));
        if (is_signed(code)) y = _mm512_abs_ps(y);
        const __m512 clamped = _mm512_max_ps(y, lowest);
        if (!is_signed(code)) y = clamped;
        __mmask16 stored = 0xffff;
        if (code == Code::Positive) stored = _mm512_cmp_ps_mask(x[j].v, _mm512_setzero_ps(), _CMP_GT_OQ);
        exponent[j] = _mm512_mask_srli_epi32(_mm512_set1_epi32(nothing), stored, _mm512_castps_si512(clamped), 23);
        const F line = fma(F(y), pick(t.slope, exponent[j]), pick(t.offset, exponent[j]));
        const F other = minimum(fma(line, F(third), F(after_third)), fma(line, F(fifth), F(after_fifth)));
        const __m512i of_element = _mm512_load_si512(ElementDitherOf<state>::all.of_element + at + j * width);
        fixed[j] = _mm512_maskz_add_epi32(stored, _mm512_castps_si512(minimum(line, other).v),
                                          _mm512_add_epi16(base, of_element));
    }
    const __m512i binade = gather_bytes<0>(exponent[0], exponent[1], exponent[2], exponent[3]);
    __m512i index = gather_bytes<2>(fixed[0], fixed[1], fixed[2], fixed[3]);
    index = _mm512_add_epi8(index, look_up(LastBytesOf<code>::all, binade));
    if (is_signed(code)) {
        const __m512i signs = gather_bytes<3>(_mm512_castps_si512(x[0].v), _mm512_castps_si512(x[1].v),
                                              _mm512_castps_si512(x[2].v), _mm512_castps_si512(x[3].v));
        const __m512i middle = _mm512_set1_epi8(zero_code_of(code));
        const __m512i above = _mm512_add_epi8(middle, index);
        index = _mm512_mask_sub_epi8(above, _mm512_movepi8_mask(signs), middle, index);
    } else {
        index = _mm512_min_epu8(index, _mm512_set1_epi8(static_cast<char>(code_size - 2)));
    }
    _mm512_storeu_si512(codes, index);
}

template <Code code>
OPTIM8_HD void decode16_group(const uint8_t* codes, const uint8_t* low, F (&out)[code_group / width]) {
    static_assert(sums_tell_pieces<code>(), "the sum tells the pieces apart");
    const __m512i upper = transpose_runs(_mm512_loadu_si512(codes));
    const __m512i lower = transpose_runs(_mm512_loadu_si512(low));
    const __m512i halves[2] = {_mm512_unpacklo_epi8(lower, upper), _mm512_unpackhi_epi8(lower, upper)};
    const __m512i none = _mm512_setzero_si512(), zero = _mm512_set1_epi32(static_cast<int>(zero16_of(code)));
    const __m512 slopes = _mm512_load_ps(PiecesBySumOf<code>::all.slope),
                 offsets = _mm512_load_ps(PiecesBySumOf<code>::all.offset);
    for (int j = 0; j < 4; ++j) {
        const __m512i number =
            j % 2 == 0 ? _mm512_unpacklo_epi16(halves[j / 2], none) : _mm512_unpackhi_epi16(halves[j / 2], none);
        const __m512i place = _mm512_sub_epi32(number, zero);
        const __m512 position = _mm512_cvtepi32_ps(_mm512_abs_epi32(place));
        const __m512 moved = is_signed(code) ? _mm512_max_ps(position, _mm512_set1_ps(Pieces<code>::least))
                                             : _mm512_add_ps(position, _mm512_set1_ps(Pieces<code>::shift));
        const __m512 next = _mm512_add_ps(position, _mm512_set1_ps(Pieces<code>::shift + 256.0f));
        const __m512i piece = _mm512_add_epi32(_mm512_srli_epi32(_mm512_castps_si512(moved), 23),
                                               _mm512_srli_epi32(_mm512_castps_si512(next), 23));
        __m512 value =
            _mm512_fmadd_ps(position, _mm512_permutexvar_ps(piece, slopes), _mm512_permutexvar_ps(piece, offsets));
        if (is_signed(code)) {
            const __m512i sign = _mm512_and_si512(place, _mm512_set1_epi32(static_cast<int>(~abs_mask)));
            value = _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(value), sign));
        } else {
            value = _mm512_max_ps(value, _mm512_setzero_ps());
        }
        out[j] = value;
    }
}

template <Code code, int state, Rounding rounding>
OPTIM8_HD void encode16_group(const F (&x)[code_group / width], float reciprocal, uint32_t start, int at,
                              uint8_t* codes, uint8_t* low) {
    const DitherTables& t = DitherTablesOf<code>::all;
    const __m512 lowest = _mm512_set1_ps(t.lowest16);
    const __m512i first = _mm512_set1_epi32(static_cast<int>(start >> 16));
    constexpr uint32_t u_and_half = (rounding == Rounding::Nearest ? u_of_nearest >> 24 : 0u) + half_cell;
    const __m512i base = _mm512_set1_epi32(static_cast<int>(u_and_half - fixed_point_bits));
    __m512i fixed[4], exponent[4];
    for (int j = 0; j < 4; ++j) {
        __m512 y = _mm512_mul_ps(x[j].v, _mm512_set1_ps(reciprocal));
        if (is_signed(code)) y = _mm512_abs_ps(y);
        const __m512 clamped = _mm512_max_ps(y, lowest);
        if (!is_signed(code)) y = clamped;
        __mmask16 stored = 0xffff;
        if (code == Code::Positive) stored = _mm512_cmp_ps_mask(x[j].v, _mm512_setzero_ps(), _CMP_GT_OQ);
        exponent[j] = _mm512_mask_srli_epi32(_mm512_set1_epi32(nothing), stored, _mm512_castps_si512(clamped), 23);
        const F line = fma(F(y), pick(t.slope, exponent[j]), pick(t.offset, exponent[j]));
        const F other = minimum(fma(line, F(third), F(after_third)), fma(line, F(fifth), F(after_fifth)));
        __m512i added = base;
        if (rounding == Rounding::Dithered) {
            const __m512i u =
                _mm512_add_epi16(first, _mm512_load_si512(ElementDitherOf<state>::all.of_element + at + j * width));
            added = _mm512_add_epi32(base, _mm512_srli_epi32(u, 8));
        }
        fixed[j] = _mm512_mask_add_epi32(_mm512_set1_epi32(half_cell), stored,
                                         _mm512_castps_si512(minimum(line, other).v), added);
    }
    const __m512i binade = gather_bytes<0>(exponent[0], exponent[1], exponent[2], exponent[3]);
    __m512i index = gather_bytes<2>(fixed[0], fixed[1], fixed[2], fixed[3]);
    __m512i rest = gather_bytes<1>(fixed[0], fixed[1], fixed[2], fixed[3]);
    index = _mm512_add_epi8(index, look_up(LastBytesOf<code>::all, binade));
    if (is_signed(code)) {
        const __m512i signs = gather_bytes<3>(_mm512_castps_si512(x[0].v), _mm512_castps_si512(x[1].v),
                                              _mm512_castps_si512(x[2].v), _mm512_castps_si512(x[3].v));
        index = _mm512_add_epi8(index, _mm512_set1_epi8(zero_code_of(code)));
        // The number of -x is 0xff00 less that of x: a byte below borrows from the one above.
        const __mmask64 negative = _mm512_movepi8_mask(signs), borrows = _mm512_test_epi8_mask(rest, rest) & negative;
        index = _mm512_mask_sub_epi8(index, negative, _mm512_set1_epi8(-1), index);
        index = _mm512_mask_add_epi8(index, borrows, index, _mm512_set1_epi8(-1));
        rest = _mm512_mask_sub_epi8(rest, negative, _mm512_setzero_si512(), rest);
    } else {
        const __m512i most = _mm512_set1_epi8(static_cast<char>(code_size - 2));
        const __mmask64 top = _mm512_cmpge_epu8_mask(index, most);
        index = _mm512_min_epu8(index, most);
        rest = _mm512_mask_min_epu8(rest, top, rest, _mm512_set1_epi8(static_cast<char>(middle_low)));
    }
    _mm512_storeu_si512(codes, index);
    _mm512_storeu_si512(low, rest);
}

OPTIM8_END
