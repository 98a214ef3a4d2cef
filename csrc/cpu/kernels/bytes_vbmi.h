// Look-ups by permutes of bytes, for AVX-512 with VBMI. Decoding reads the exact 256-entry table.
#pragma once

OPTIM8_BEGIN

template <Code code>
OPTIM8_HD void decode_group(const uint8_t* codes, F (&out)[code_group / width]) {
    const Planes& planes = PlanesOf<code>::all;
    // The byte interleaving below works within 128-bit lanes; the transposition makes it come out in order.
    const __m512i index = transpose_runs(_mm512_loadu_si512(codes));
    const __mmask64 upper = _mm512_movepi8_mask(index);
    __m512i byte[4];
    for (int b = 0; b < 4; ++b) {
        const uint8_t* plane = planes.byte[b];
        const __m512i low = _mm512_permutex2var_epi8(at(plane, 0), index, at(plane, 1));
        const __m512i high = _mm512_permutex2var_epi8(at(plane, 2), index, at(plane, 3));
        byte[b] = _mm512_mask_blend_epi8(upper, low, high);
    }
    const __m512i low01 = _mm512_unpacklo_epi8(byte[0], byte[1]), high01 = _mm512_unpackhi_epi8(byte[0], byte[1]);
    const __m512i low23 = _mm512_unpacklo_epi8(byte[2], byte[3]), high23 = _mm512_unpackhi_epi8(byte[2], byte[3]);
    out[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low01, low23));
    out[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low01, low23));
    out[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(high01, high23));
    out[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(high01, high23));
}

// Byte `which` of every 32-bit lane of four vectors, in order.
template <int which>
OPTIM8_HD __m512i gather_bytes(__m512i a, __m512i b, __m512i c, __m512i d) {
    alignas(64) static constexpr auto index = [] {
        struct {
            uint8_t byte[64];
        } t{};
        for (int i = 0; i < 64; ++i) t.byte[i] = static_cast<uint8_t>(4 * (i % 32) + which);
        return t;
    }();
    const __m512i pick = _mm512_load_si512(index.byte);
    const __m512i low = _mm512_permutex2var_epi8(a, pick, b);
    const __m512i high = _mm512_permutex2var_epi8(c, pick, d);
    return _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1);
}

OPTIM8_HD __m512i look_up(const Bytes32& table, __m512i index) {
    return _mm512_permutexvar_epi8(index, _mm512_load_si512(table.twice));
}

OPTIM8_END
