// One lane: plain C++, for every machine, and the readable form of what the others do.
#pragma once

OPTIM8_BEGIN

using F = float;
using I = int32_t;
using U = uint32_t;
constexpr int width = 1;
constexpr int code_group = 64;

template <class T>
OPTIM8_HD F load(const T* from) {
    return to_float(*from);
}
template <class T>
OPTIM8_HD void store(T* to, F x) {
    *to = from_float<T>(x);
}
OPTIM8_HD uint32_t reduce_max(U x) { return x; }

template <Code code>
OPTIM8_HD void decode_group(const uint8_t* codes, F (&out)[code_group]) {
    for (int i = 0; i < code_group; ++i) out[i] = Tables<code>::all.value[codes[i]];
}

template <Code code>
OPTIM8_HD void encode_group(const F (&x)[code_group], float reciprocal, uint8_t* codes) {
    for (int i = 0; i < code_group; ++i) codes[i] = encode<code>(x[i], reciprocal, Tables<code>::all);
}

// Values `at` to at + code_group of a block of a state, in which u begins with `start`.
template <Code code, int state>
OPTIM8_HD void encode_group_dithered(const F (&x)[code_group], float reciprocal, uint32_t start, int at,
                                     uint8_t* codes) {
    for (int i = 0; i < code_group; ++i)
        codes[i] = static_cast<uint8_t>(encode_dithered<code>(x[i], reciprocal,
                                                              dither<state>(start, static_cast<uint32_t>(at + i)),
                                                              DitherTablesOf<code>::all) >>
                                        16);
}

// The same for state in 16 bits; with `rounding` to nearest there is no u.
template <Code code, int state, Rounding rounding>
OPTIM8_HD void encode16_group(const F (&x)[code_group], float reciprocal, uint32_t start, int at, uint8_t* codes,
                              uint8_t* low) {
    for (int i = 0; i < code_group; ++i) {
        const uint32_t u =
            rounding == Rounding::Dithered ? dither<state>(start, static_cast<uint32_t>(at + i)) : u_of_nearest;
        const uint32_t number = encode16<code>(x[i], reciprocal, u, DitherTablesOf<code>::all);
        codes[i] = code_of16(number);
        low[i] = low_of16(number);
    }
}

template <Code code>
OPTIM8_HD void decode16_group(const uint8_t* codes, const uint8_t* low, F (&out)[code_group]) {
    for (int i = 0; i < code_group; ++i)
        out[i] = decode16<code>(number16(codes[i], low[i]), Decode16TablesOf<code>::all);
}

OPTIM8_END
