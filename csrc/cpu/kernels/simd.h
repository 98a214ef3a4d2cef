// The vector types of the instruction set this file is compiled for: F (float32), I (int32), U (uint32), each of
// `width` lanes, with the operations of core/number.h; loads and stores of the storage types, and of two vectors at
// once where that takes fewer instructions (load_pair, store_pair); and the codec primitives over `code_group` values,
// decode_group, encode_group and encode_group_dithered, and decode16_group and encode16_group.
#pragma once

#include "core/code16.h"
#include "core/codec.h"
#include "core/number.h"
#include "core/storage.h"
#include "core/weight.h"
#include "cpu/kernels/tables.h"

OPTIM8_BEGIN
constexpr int group = 64;

// The part of a block's elements in u; sums are modulo 2^16.
struct alignas(64) ElementDither {
    uint32_t of_element[step_block];
};
template <int state>
constexpr ElementDither make_element_dither() {
    ElementDither made{};
    for (uint32_t i = 0; i < step_block; ++i) made.of_element[i] = dither<state>(0, i) >> 16;
    return made;
}
template <int state>
struct ElementDitherOf {
    static constexpr ElementDither all = make_element_dither<state>();
};
// What they are added to in the lower halves of words; the upper halves take away what the bits of a fixed-point number
// have there.
OPTIM8_HD uint32_t dither_base(uint32_t start) { return (start >> 16) - fixed_point_bits; }

OPTIM8_END

#if defined(__AVX2__)
#define OPTIM8_WEIGHT_VECTORS 1  // join_weights and part_weights of bfloat16 parameters
#endif
#if defined(__AVX512BW__)
#include "cpu/kernels/simd_avx512.h"
#elif defined(__AVX2__)
#include "cpu/kernels/simd_avx2.h"
#elif defined(OPTIM8_NEON)
#include "cpu/kernels/simd_neon.h"
#else
#include "cpu/kernels/simd_scalar.h"
#endif

OPTIM8_BEGIN
static_assert(Vocabulary<F>::complete);

template <class T>
OPTIM8_HD void load_pair(const T* from, F& a, F& b) {
    a = load(from);
    b = load(from + width);
}
template <class T>
OPTIM8_HD void store_pair(T* to, F a, F b) {
    store(to, a);
    store(to + width, b);
}
// Vectors of values that lie side by side.
template <class T, int n>
OPTIM8_HD void load_vectors(const T* from, F (&x)[n]) {
    static_assert(n % 2 == 0, "pairs");
    for (int j = 0; j < n; j += 2) load_pair(from + j * width, x[j], x[j + 1]);
}
template <class T, int n>
OPTIM8_HD void store_vectors(T* to, const F (&x)[n]) {
    static_assert(n % 2 == 0, "pairs");
    for (int j = 0; j < n; j += 2) store_pair(to + j * width, x[j], x[j + 1]);
}
static_assert(step_block % code_group == 0, "blocks are whole groups");
OPTIM8_END
