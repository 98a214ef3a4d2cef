// The same look-ups for AVX-512 without VBMI. Decoding reads the exact 256-entry table too, by permutes of half words.
#pragma once

OPTIM8_BEGIN

// The two halves of each of the 256 table values.
struct alignas(64) HalfPlanes {
    uint16_t half[2][code_size];
};
constexpr HalfPlanes make_half_planes(const CodeTables& t) {
    HalfPlanes planes{};
    for (int i = 0; i < code_size; ++i)
        for (int h = 0; h < 2; ++h) planes.half[h][i] = static_cast<uint16_t>(constant_bits(t.value[i]) >> (16 * h));
    return planes;
}
template <Code code>
struct HalfPlanesOf {
    static constexpr HalfPlanes all = make_half_planes(Tables<code>::all);
};

template <Code code>
OPTIM8_HD void decode_group(const uint8_t* codes, F (&out)[code_group / width]) {
    const HalfPlanes& planes = HalfPlanesOf<code>::all;
    const __m512i none = _mm512_setzero_si512();
    // The interleaving works within 128-bit lanes; the transposition makes it come out in order.
    const __m512i all = transpose_runs(_mm512_loadu_si512(codes));
    for (int i = 0; i < 2; ++i) {
        const __m512i index = i == 0 ? _mm512_unpacklo_epi8(all, none) : _mm512_unpackhi_epi8(all, none);
        const __mmask32 second = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64));
        const __mmask32 upper = _mm512_test_epi16_mask(index, _mm512_set1_epi16(128));
        __m512i half[2];
        for (int h = 0; h < 2; ++h) {
            const auto of_quarter = [&](int quarter) {
                const void* plane = planes.half[h] + 64 * quarter;
                return _mm512_permutex2var_epi16(at(plane, 0), index, at(plane, 1));
            };
            half[h] = _mm512_mask_blend_epi16(upper, _mm512_mask_blend_epi16(second, of_quarter(0), of_quarter(1)),
                                              _mm512_mask_blend_epi16(second, of_quarter(2), of_quarter(3)));
        }
        out[2 * i] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(half[0], half[1]));
        out[2 * i + 1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(half[0], half[1]));
    }
}

// Byte `which` of every 32-bit lane of four vectors, in order.
template <int which>
OPTIM8_HD __m512i gather_bytes(__m512i a, __m512i b, __m512i c, __m512i d) {
    // To a run of each 128-bit lane of its own; what is not picked becomes 0.
    const auto picked = [](__m512i x, int run) {
        constexpr int bytes = which | (which + 4) << 8 | (which + 8) << 16 | (which + 12) << 24, no = -1;
        const __m128i pick =
            _mm_setr_epi32(run == 0 ? bytes : no, run == 1 ? bytes : no, run == 2 ? bytes : no, run == 3 ? bytes : no);
        return _mm512_shuffle_epi8(x, _mm512_broadcast_i32x4(pick));
    };
    const __m512i low = _mm512_or_si512(picked(a, 0), picked(b, 1)), high = _mm512_or_si512(picked(c, 2), picked(d, 3));
    return transpose_runs(_mm512_or_si512(low, high));
}

OPTIM8_HD __m512i look_up(const Bytes32& table, __m512i index) {
    const auto half = [&](int from) {
        return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(table.twice + from)));
    };
    const __m512i place = _mm512_and_si512(index, _mm512_set1_epi8(31));  // a shuffle gives 0 where bit 7 is set
    const __mmask64 upper = _mm512_test_epi8_mask(place, _mm512_set1_epi8(16));
    return _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(half(0), place), upper, half(16), place);
}

OPTIM8_END
