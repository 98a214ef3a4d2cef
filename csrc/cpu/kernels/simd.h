// The vector types of the instruction set this file is compiled for: F (float32), I (int32), U (uint32), each of
// `width` lanes, with the operations of core/number.h; loads and stores of the storage types; and the two codec
// primitives over `code_group` values, decode_group and encode_group.
#pragma once

#include "core/codec.h"
#include "core/number.h"
#include "core/storage.h"

OPTIM8_BEGIN
constexpr int group = 64;
OPTIM8_END

#if defined(__AVX512VBMI__)
#include "cpu/kernels/simd_avx512.h"
#elif defined(__AVX2__)
#include "cpu/kernels/simd_avx2.h"
#else
#include "cpu/kernels/simd_scalar.h"
#endif

OPTIM8_BEGIN
static_assert(Vocabulary<F>::complete);
static_assert(step_block % code_group == 0, "blocks are whole groups");
OPTIM8_END
