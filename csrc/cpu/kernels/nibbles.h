// Primitives of 4-bit codes for the instruction set this file is compiled for: 64 quotients to 32 packed bytes, 32
// packed bytes to 64 values, and the table look-ups of the packed product, 16 lanes at a time.
#pragma once

#include "core/fourbit.h"
#include "cpu/kernels/simd.h"

OPTIM8_BEGIN

constexpr int gemv_lanes = 16;

#if defined(__AVX512BW__)

OPTIM8_HD F clamp_unit(F y) { return _mm512_range_ps(y.v, _mm512_set1_ps(1.0f), 0x02); }  // smaller magnitude, own sign

// The codes below and above a cell's midpoint as bytes.
struct CellBytes {
    Bytes32 below, above;
};
static_assert(fourbit_cells == 32);
constexpr CellBytes make_cell_bytes(const FourbitTables& t) {
    CellBytes bytes{};
    for (int i = 0; i < 64; ++i) {
        bytes.below.twice[i] = static_cast<uint8_t>(t.below[i % 32]);
        bytes.above.twice[i] = static_cast<uint8_t>(t.above[i % 32]);
    }
    return bytes;
}
template <Fourbit type>
struct CellBytesOf {
    static constexpr CellBytes all = make_cell_bytes(FourbitOf<type>::all);
};

template <Fourbit type>
OPTIM8_HD void encode_nibbles(const float* quotients, uint8_t* packed) {
    const FourbitTables& t = FourbitOf<type>::all;
    __m512i cell[4];
    uint64_t is_above = 0;
    for (int j = 0; j < 4; ++j) {
        const __m512 y = _mm512_loadu_ps(quotients + 16 * j);
        const __m512 scaled = _mm512_mul_ps(y, _mm512_set1_ps(16.0f));
        cell[j] = _mm512_cvt_roundps_epi32(scaled, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
        is_above |= static_cast<uint64_t>(_mm512_cmp_ps_mask(y, pick(t.midpoint, cell[j]).v, _CMP_GT_OQ)) << (16 * j);
    }
    const __m512i cells = gather_bytes<0>(cell[0], cell[1], cell[2], cell[3]);
    const __m512i below = look_up(CellBytesOf<type>::all.below, cells);
    const __m512i above = look_up(CellBytesOf<type>::all.above, cells);
    const __m512i codes = _mm512_mask_blend_epi8(is_above, below, above);
    const __m512i pairs = _mm512_maddubs_epi16(codes, _mm512_set1_epi16(0x0110));  // 16 * first + second
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed), _mm512_cvtepi16_epi8(pairs));
}

// The 64 nibbles of 32 bytes, high one first, each in the low half of a byte (the high half is whatever came along).
OPTIM8_HD __m512i spread_nibbles(const uint8_t* packed) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
#if defined(__AVX512VBMI__)
    const __m512i start = _mm512_set1_epi64(0x181c'1014'080c'0004);  // bit 4, 0, 12, 8, 20, 16, 28, 24
    return _mm512_multishift_epi64_epi8(start, _mm512_cvtepu32_epi64(bytes));
#else
    const __m512i words = _mm512_cvtepu8_epi16(bytes);
    return _mm512_or_si512(_mm512_srli_epi16(words, 4), _mm512_slli_epi16(words, 8));
#endif
}

OPTIM8_HD void decode_nibbles(const uint8_t* packed, const float (&table)[fourbit_size], float* out) {
    const __m512i nibbles = spread_nibbles(packed);
    const __m512 values = _mm512_loadu_ps(table);
    const auto put = [&](__m128i quarter, float* to) {
        _mm512_storeu_ps(to, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(quarter), values));
    };
    put(_mm512_castsi512_si128(nibbles), out);
    put(_mm512_extracti32x4_epi32(nibbles, 1), out + 16);
    put(_mm512_extracti32x4_epi32(nibbles, 2), out + 32);
    put(_mm512_extracti32x4_epi32(nibbles, 3), out + 48);
}

template <class T>
OPTIM8_HD void decode_nibbles(const uint8_t* packed, const T (&table)[fourbit_size], T* out) {
    static_assert(sizeof(T) == 2, "16-bit storage");
    const __m512i nibbles = spread_nibbles(packed);
    // Word permutes take five bits of index, so the table stands there twice.
    const __m512i values = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(table)));
    const __m512i first = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(nibbles));
    const __m512i second = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(nibbles, 1));
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(first, values));
    _mm512_storeu_si512(out + 32, _mm512_permutexvar_epi16(second, values));
}

struct NibbleTable {
    __m512 values;
    explicit NibbleTable(const float* table) : values(_mm512_loadu_ps(table)) {}
    // The values of nibble `turn` (0 to 7, lowest bits first) of each 32-bit lane.
    template <int turn>
    OPTIM8_HD F at(U words) const {
        return _mm512_permutexvar_ps(_mm512_srli_epi32(words.v, 4 * turn), values);
    }
};
OPTIM8_HD U load_words(const uint8_t* from) { return U(_mm512_loadu_si512(from)); }
template <int scales>
OPTIM8_HD F spread_scales(const float* absmax, int) {
    __m512 spread = _mm512_set1_ps(absmax[0]);
    for (int i = 1; i < scales; ++i) {
        const __mmask16 from_here = static_cast<__mmask16>(0xffffu << (i * gemv_lanes / scales));
        spread = _mm512_mask_broadcastss_ps(spread, from_here, _mm_load_ss(absmax + i));
    }
    return spread;
}

#elif defined(OPTIM8_NEON)

OPTIM8_HD F clamp_unit(F y) { return larger(smaller(y, F(1.0f)), F(-1.0f)); }

// By cell, the bytes of the midpoints and the codes below and above.
struct alignas(64) CellBytes {
    uint8_t midpoint[4][fourbit_cells], below[fourbit_cells], above[fourbit_cells];
};
constexpr CellBytes make_cell_bytes(const FourbitTables& t) {
    CellBytes bytes{};
    for (int i = 0; i < fourbit_cells; ++i) {
        for (int b = 0; b < 4; ++b)
            bytes.midpoint[b][i] = static_cast<uint8_t>(constant_bits(t.midpoint[i]) >> (8 * b));
        bytes.below[i] = static_cast<uint8_t>(t.below[i]);
        bytes.above[i] = static_cast<uint8_t>(t.above[i]);
    }
    return bytes;
}
template <Fourbit type>
struct CellBytesOf {
    static constexpr CellBytes all = make_cell_bytes(FourbitOf<type>::all);
};

template <Fourbit type>
OPTIM8_HD void encode_nibbles(const float* quotients, uint8_t* packed) {
    const CellBytes& t = CellBytesOf<type>::all;
    const auto look_up = [](const uint8_t* table, uint8x16_t at) {
        return vqtbl2q_u8(table_of(table, table + run), at);
    };
    uint8x16_t codes[group / run];
    for (int i = 0; i < group / run; ++i) {
        F y[run_vectors], midpoint[run_vectors];
        uint32x4_t cell[run_vectors], above[run_vectors];
        for (int j = 0; j < run_vectors; ++j) y[j] = load(quotients + i * run + j * width);
        for (int j = 0; j < run_vectors; ++j)
            cell[j] = vreinterpretq_u32_s32(vcvtpq_s32_f32(vmulq_n_f32(y[j].v, 16.0f)));
        const uint8x16_t cells = vandq_u8(gather_bytes<0>(cell), vdupq_n_u8(fourbit_cells - 1));
        uint8x16_t byte[4];
        for (int b = 0; b < 4; ++b) byte[b] = look_up(t.midpoint[b], cells);
        scatter_bytes(byte, midpoint);
        for (int j = 0; j < run_vectors; ++j) above[j] = (y[j] > midpoint[j]).v;
        codes[i] = vbslq_u8(gather_bytes<0>(above), look_up(t.above, cells), look_up(t.below, cells));
    }
    for (int i = 0; i < group / run; i += 2) {
        const uint8x16_t first = vuzp1q_u8(codes[i], codes[i + 1]), second = vuzp2q_u8(codes[i], codes[i + 1]);
        vst1q_u8(packed + i / 2 * run, vsliq_n_u8(second, first, 4));
    }
}

// work(i, codes) for each run of the 64 codes of 32 bytes.
template <class Work>
OPTIM8_HD void each_run(const uint8_t* packed, const Work& work) {
    for (int i = 0; i < group / run; i += 2) {
        const uint8x16_t pairs = vld1q_u8(packed + i / 2 * run);
        const uint8x16_t first = vshrq_n_u8(pairs, 4), second = vandq_u8(pairs, vdupq_n_u8(15));
        work(i, vzip1q_u8(first, second));
        work(i + 1, vzip2q_u8(first, second));
    }
}

OPTIM8_HD void decode_nibbles(const uint8_t* packed, const float (&table)[fourbit_size], float* out) {
    const uint8x16x4_t planes = vld4q_u8(reinterpret_cast<const uint8_t*>(table));
    each_run(packed, [&](int i, uint8x16_t codes) {
        uint8x16_t byte[4];
        F values[run_vectors];
        for (int b = 0; b < 4; ++b) byte[b] = vqtbl1q_u8(planes.val[b], codes);
        scatter_bytes(byte, values);
        for (int j = 0; j < run_vectors; ++j) store(out + i * run + j * width, values[j]);
    });
}

template <class T>
OPTIM8_HD void decode_nibbles(const uint8_t* packed, const T (&table)[fourbit_size], T* out) {
    static_assert(sizeof(T) == 2, "16-bit storage");
    const uint8x16x2_t planes = vld2q_u8(reinterpret_cast<const uint8_t*>(table));
    each_run(packed, [&](int i, uint8x16_t codes) {
        const uint8x16_t low = vqtbl1q_u8(planes.val[0], codes), high = vqtbl1q_u8(planes.val[1], codes);
        uint8_t* to = reinterpret_cast<uint8_t*>(out + i * run);
        vst1q_u8(to, vzip1q_u8(low, high));
        vst1q_u8(to + run, vzip2q_u8(low, high));
    });
}

struct NibbleTable {
    uint8x16x4_t values;
    explicit NibbleTable(const float* table) : values(quarter(reinterpret_cast<const uint8_t*>(table))) {}
    template <int turn>
    OPTIM8_HD F at(U words) const {
        const uint32x4_t nibbles = vshrq_n_u32(vshlq_n_u32(words.v, 28 - 4 * turn), 28);
        return vreinterpretq_f32_u8(vqtbl4q_u8(values, byte_places(nibbles)));
    }
};
OPTIM8_HD U load_words(const uint8_t* from) { return U(vreinterpretq_u32_u8(vld1q_u8(from))); }
template <int scales>
OPTIM8_HD F spread_scales(const float* absmax, int first_lane) {
    return F(absmax[first_lane * scales / gemv_lanes]);
}

#else

template <Fourbit type>
OPTIM8_HD void encode_nibbles(const float* quotients, uint8_t* packed) {
    int32_t codes[group];
    for (int i = 0; i < group; ++i) codes[i] = encode_fourbit(quotients[i], FourbitOf<type>::all);
    for (int i = 0; i < group / 2; ++i) packed[i] = static_cast<uint8_t>(codes[2 * i] << 4 | codes[2 * i + 1]);
}

template <class T>
OPTIM8_HD void decode_nibbles(const uint8_t* packed, const T (&table)[fourbit_size], T* out) {
    for (int i = 0; i < group / 2; ++i) {
        out[2 * i] = table[packed[i] >> 4];
        out[2 * i + 1] = table[packed[i] & 15];
    }
}

#if defined(__AVX2__)

OPTIM8_HD F clamp_unit(F y) { return _mm256_max_ps(_mm256_min_ps(y.v, _mm256_set1_ps(1.0f)), _mm256_set1_ps(-1.0f)); }

struct NibbleTable {
    __m256 low, high;
    explicit NibbleTable(const float* table) : low(_mm256_loadu_ps(table)), high(_mm256_loadu_ps(table + 8)) {}
    template <int turn>
    OPTIM8_HD F at(U words) const {
        const __m256i index = _mm256_srli_epi32(words.v, 4 * turn);
        const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3 of the nibble to the sign
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), upper);
    }
};
OPTIM8_HD U load_words(const uint8_t* from) { return U(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }
template <int scales>
OPTIM8_HD F spread_scales(const float* absmax, int first_lane) {
    const float* from = absmax + first_lane * scales / gemv_lanes;
    if (scales < 4) return _mm256_set1_ps(*from);
    return _mm256_set_m128(_mm_set1_ps(from[1]), _mm_set1_ps(from[0]));
}

#else

struct NibbleTable {
    const float* values;
    explicit NibbleTable(const float* table) : values(table) {}
    template <int turn>
    OPTIM8_HD F at(U words) const {
        return values[(words >> (4 * turn)) & 15];
    }
};
OPTIM8_HD U load_words(const uint8_t* from) {
    return static_cast<uint32_t>(from[0]) | static_cast<uint32_t>(from[1]) << 8 | static_cast<uint32_t>(from[2]) << 16 |
           static_cast<uint32_t>(from[3]) << 24;
}
template <int scales>
OPTIM8_HD F spread_scales(const float* absmax, int first_lane) {
    return absmax[first_lane * scales / gemv_lanes];
}

#endif
#endif

OPTIM8_END
