// What the sources of this program share: the kernels of each instruction set, values from a seed, and the output that
// is compared. The program runs without an operating system and without libraries, so that an emulator of the processor
// is enough; on this machine it is a shared library.
#pragma once

#include "core/jobs.h"
#include "core/storage.h"
#include "cpu/dispatch.h"

#include <cstring>

namespace optim8 {

#define OPTIM8_DECLARE(name, job) void name(const job&, int64_t, int64_t);
#define OPTIM8_NAME(name, job) name,
#define OPTIM8_SET(set) \
    namespace set { \
    OPTIM8_KERNELS(OPTIM8_DECLARE) \
    inline const Kernels table = {#set, OPTIM8_KERNELS(OPTIM8_NAME)}; \
    }
OPTIM8_SET(scalar)
#if defined(__aarch64__)
OPTIM8_SET(neon)
inline const Kernels* const sets[] = {&scalar::table, &neon::table};
#else
inline const Kernels* const sets[] = {&scalar::table};
#endif

// SplitMix64 (Steele, Lea and Flood 2014).
struct Random {
    uint64_t state;
    uint32_t next() {
        uint64_t z = state += 0x9e3779b97f4a7c15ull;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ z >> 27) * 0x94d049bb133111ebull;
        return static_cast<uint32_t>((z ^ z >> 31) >> 32);
    }
    uint32_t below(uint32_t n) { return static_cast<uint32_t>(uint64_t{next()} * n >> 32); }
};

// Plain: of a few binades. Wide: over many, with zeros. NotFinite: plain, with some NaN and infinities. AnyBits: any.
enum class Kind { Plain, Wide, Zeros, Subnormal, Huge, NotFinite, AnyBits };
constexpr Kind kinds[] = {Kind::Plain, Kind::Wide,      Kind::Zeros,  Kind::Subnormal,
                          Kind::Huge,  Kind::NotFinite, Kind::AnyBits};
constexpr bool finite(Kind kind) { return kind != Kind::NotFinite && kind != Kind::AnyBits; }

// float16 has less range: there the binades are nearer to 1.
inline float value_of(Kind kind, Random& random, bool narrow = false) {
    const uint32_t bits = random.next(), sign_and_mantissa = bits & 0x807fffffu, pick = random.below(64);
    const auto binade = [&](int least, int most) {
        return sign_and_mantissa | static_cast<uint32_t>(least + static_cast<int>(random.below(most - least + 1)))
                                       << 23;
    };
    uint32_t result = binade(122, 128);
    if (kind == Kind::Wide) result = pick < 4 ? bits & 0x80000000u : narrow ? binade(100, 142) : binade(87, 137);
    if (kind == Kind::Zeros) result = bits & 0x80000000u;
    if (kind == Kind::Subnormal) result = narrow ? binade(102, 113) : sign_and_mantissa >> (pick & 15);
    if (kind == Kind::Huge) result = narrow ? binade(138, 142) : binade(200, 254);
    if (kind == Kind::NotFinite && pick == 0) result = 0x7fc00000u | (bits & 0x80000000u);
    if (kind == Kind::NotFinite && pick == 1) result = inf_bits | (bits & 0x80000000u);
    if (kind == Kind::AnyBits) result = bits;
    return float_of(result);
}
template <class T>
void fill(T* values, int64_t n, Kind kind, Random& random) {
    constexpr bool narrow = sizeof(T) == 2 && !std::is_same_v<T, bfloat16>;
    for (int64_t i = 0; i < n; ++i) values[i] = from_float<T>(value_of(kind, random, narrow));
}
template <class T>
void fill_bits(T* values, int64_t n, Random& random) {
    for (int64_t i = 0; i < n; ++i) values[i] = static_cast<T>(random.next());
}

// What a case has put out. A NaN is put as the same NaN: IEEE 754 does not say which bits it has.
extern "C" unsigned char output[];
constexpr int64_t output_room = 8 << 20;
inline int64_t output_size = 0;

inline void put_bytes(const void* from, int64_t n) {
    if (output_size + n > output_room) __builtin_trap();
    std::memcpy(output + output_size, from, static_cast<size_t>(n));
    output_size += n;
}
inline void put_one(float x) {
    const uint32_t bits = magnitude_bits(x) > inf_bits ? 0x7fc00000u : bits_of(x);
    put_bytes(&bits, sizeof bits);
}
inline void put_one(bfloat16 x) {
    const uint16_t bits = (x.bits & 0x7fffu) > 0x7f80u ? 0x7fc0u : x.bits;
    put_bytes(&bits, sizeof bits);
}
inline void put_one(float16 x) {
    const uint16_t bits = (x.bits & 0x7fffu) > 0x7c00u ? 0x7e00u : x.bits;
    put_bytes(&bits, sizeof bits);
}
inline void put_one(double x) { put_bytes(&x, sizeof x); }
template <class T>
void put(const T* values, int64_t n) {
    if constexpr (std::is_integral_v<T>)
        put_bytes(values, n * static_cast<int64_t>(sizeof(T)));
    else
        for (int64_t i = 0; i < n; ++i) put_one(values[i]);
}

template <class T>
constexpr Storage storage_of = std::is_same_v<T, float>      ? Storage::Float32
                               : std::is_same_v<T, bfloat16> ? Storage::BFloat16
                                                             : Storage::Float16;
// work(TypeOf<T>) for each storage type.
template <class Work>
void each_type(const Work& work) {
    work(TypeOf<float>{});
    work(TypeOf<bfloat16>{});
    work(TypeOf<float16>{});
}

// A case puts out what a set's kernels give. X(name)
#define OPTIM8_CASES(X) \
    X(number) \
    X(encode) \
    X(keep) \
    X(restore) \
    X(quantize) \
    X(dequantize) \
    X(fourbit) \
    X(gemv) \
    X(int8) \
    X(step_codes) \
    X(step_wide) \
    X(step_many)
#define OPTIM8_DECLARE_CASE(name) void name##_case(const Kernels& kernels);
OPTIM8_CASES(OPTIM8_DECLARE_CASE)
#undef OPTIM8_DECLARE_CASE

}  // namespace optim8
