// Cases of the codec and of the functional API's kernels.
#include "core/codec.h"
#include "core/dither.h"
#include "program.h"

namespace optim8 {
namespace {

constexpr int64_t most = 1 << 16;  // values
float floats[4][most], scales[most];
uint8_t bytes[2][most];
int32_t numbers[most];
// Of any storage, at odd addresses: behind the first value.
alignas(16) unsigned char stored[4 * most + 4], results[4 * most + 4];
template <class T>
T* values_of() {
    return reinterpret_cast<T*>(stored) + 1;
}
template <class T>
T* results_of() {
    return reinterpret_cast<T*>(results) + 1;
}

// With whole groups, tails, and blocks that end within a group.
constexpr int64_t sizes[] = {1, 15, 16, 17, 63, 255, 256, 1000, 4095};

}  // namespace

void number_case(const Kernels& kernels) {
    const float magnitudes[] = {0,
                                0x1p-149f,
                                0x1p-127f,
                                0x1p-126f,
                                3e-30f,
                                0x1p-64f,
                                1e-8f,
                                1 / 3.0f,
                                0.5f,
                                1 - 0x1p-24f,
                                1,
                                1 + 0x1p-23f,
                                3,
                                0x1p24f + 2,
                                1e19f,
                                0x1p126f,
                                largest_finite,
                                float_of(inf_bits),
                                float_of(0x7fc00000u)};
    constexpr int count = sizeof magnitudes / sizeof *magnitudes;
    Random random{1};
    int64_t n = 0;
    const auto number = [&](uint32_t i) { return i % 2 == 0 ? magnitudes[i / 2] : -magnitudes[i / 2]; };
    for (uint32_t i = 0; i < 2 * count; ++i)
        for (uint32_t j = 0; j < 2 * count; ++j, ++n) {
            floats[0][n] = number(i);
            floats[1][n] = number(j);
            floats[2][n] = number(random.below(2 * count));
        }
    for (; n < 20'001; ++n)
        for (int k = 0; k < 3; ++k) floats[k][n] = value_of(Kind::AnyBits, random);
    for (size_t operation = 0; operation < sizeof number_operation_names / sizeof *number_operation_names;
         ++operation) {
        const NumberJob job{static_cast<NumberOperation>(operation), floats[0], floats[1], floats[2], floats[3], n};
        kernels.number_blocks(job, 0, blocks_of(n, step_block));
        put(floats[3], n);
    }
}

// Numbers all over [0, 1], and the neighbours of each midpoint of two values.
void encode_case(const Kernels& kernels) {
    const auto encode = [&](CodeKind kind, int64_t n) {
        const EncodeJob job{floats[0], bytes[0], n, kind};
        kernels.encode_blocks(job, 0, blocks_of(n, step_block));
        put(bytes[0], n);
    };
    for (const CodeKind kind : {CodeKind::Signed, CodeKind::Unsigned}) {
        const float* value =
            kind == CodeKind::Signed ? Tables<Code::Signed>::all.value : Tables<Code::Unsigned>::all.value;
        int64_t n = 0;
        for (uint32_t bits = 0; bits <= 0x3f800000u; bits += 16'411) floats[0][n++] = float_of(bits);
        encode(kind, n);
        if (kind == CodeKind::Signed) {
            for (int64_t i = 0; i < n; ++i) floats[0][i] = -floats[0][i];
            encode(kind, n);
        }
        n = 0;
        for (int c = 0; c + 1 < code_size; ++c)
            for (int32_t ulp = -8; ulp <= 8; ++ulp)
                floats[0][n++] = float_of(bits_of(midpoint(value[c], value[c + 1])) + static_cast<uint32_t>(ulp));
        // That of 0 and a value has no neighbours that matter, but -0 and NaN do.
        floats[0][n++] = -0.0f;
        floats[0][n++] = float_of(0x7fc00000u);
        encode(kind, n);
    }
}

void keep_case(const Kernels& kernels) {
    constexpr int64_t n = 12 * step_block + 77, blocks = blocks_of(n, step_block);
    Random random{2};
    for (const Kind kind : kinds) {
        if (!finite(kind)) continue;
        fill(floats[0], n, kind, random);
        for (int64_t b = 0; b < blocks; ++b) numbers[b] = static_cast<int32_t>(random.next() >> 1);
        for (int form = 0; form < 18; ++form) {
            const int state = form % 3, low = form / 3 % 3;
            const bool with_sign = form >= 9;
            const KeepJob job{floats[0],
                              bytes[0],
                              low == 0 ? nullptr : bytes[1],
                              scales,
                              numbers,
                              n,
                              1.0 + form,
                              state,
                              with_sign,
                              low == 1 ? Rounding::Nearest : Rounding::Dithered};
            kernels.keep_blocks(job, 0, blocks);
            put(bytes[0], n);
            if (low != 0) put(bytes[1], n);
            put(scales, blocks);
        }
    }
}

// Every number of 16 bits.
void restore_case(const Kernels& kernels) {
    for (int64_t i = 0; i < most; ++i) {
        bytes[0][i] = static_cast<uint8_t>(i >> 8);
        bytes[1][i] = static_cast<uint8_t>(i);
    }
    const float hostile[] = {1, 0.0f, 0x1p-149f, 3e-39f, 1e-20f, 0.7f, largest_finite};
    for (int64_t b = 0; b < most / step_block; ++b) scales[b] = hostile[b % 7];
    for (const bool with_sign : {false, true})
        for (const int64_t n : {most, int64_t{1001}}) {
            const RestoreJob job{bytes[0], bytes[1], scales, floats[0], n, with_sign};
            kernels.restore_blocks(job, 0, blocks_of(n, step_block));
            put(floats[0], n);
        }
}

namespace {

constexpr CodeKind code_kinds[] = {CodeKind::Signed, CodeKind::Unsigned, CodeKind::Positive, CodeKind::Any};
float middle[code_size];
const float* code_of_any() {
    const float* value = Tables<Code::Signed>::all.value;
    for (int i = 0; i + 1 < code_size; ++i) middle[i] = midpoint(value[i], value[i + 1]);
    return value;
}

}  // namespace

void quantize_case(const Kernels& kernels) {
    Random random{3};
    const float* code = code_of_any();
    each_type([&](auto type) {
        using T = typename decltype(type)::type;
        for (const Kind kind : kinds)
            for (const int64_t n : sizes)
                for (const int64_t blocksize : {int64_t{64}, int64_t{256}, int64_t{4096}}) {
                    fill(values_of<T>(), n, kind, random);
                    for (const CodeKind of_code : code_kinds) {
                        const QuantizeJob job{values_of<T>(), bytes[0],      scales, code, middle, n,
                                              blocksize,      storage_of<T>, of_code};
                        kernels.quantize_blocks(job, 0, blocks_of(n, blocksize));
                        put(bytes[0], n);
                        put(scales, blocks_of(n, blocksize));
                    }
                }
    });
}

void dequantize_case(const Kernels& kernels) {
    Random random{4};
    const float* code = code_of_any();
    for (int64_t i = 0; i < most; ++i) bytes[0][i] = static_cast<uint8_t>(i < 512 ? i : random.next());
    each_type([&](auto type) {
        using T = typename decltype(type)::type;
        for (const Kind kind : kinds) {
            fill(scales, 64, kind, random);
            for (const int64_t n : sizes)
                for (const CodeKind of_code : code_kinds) {
                    const DequantizeJob job{bytes[0], scales, code, results_of<T>(), n, 64, storage_of<T>, of_code};
                    kernels.dequantize_blocks(job, 0, blocks_of(n, 64));
                    put(results_of<T>(), n);
                }
        }
    });
}

void fourbit_case(const Kernels& kernels) {
    Random random{5};
    each_type([&](auto type) {
        using T = typename decltype(type)::type;
        for (const Fourbit fourbit : {Fourbit::NF4, Fourbit::FP4})
            for (const Kind kind : kinds)
                for (const int64_t n : sizes)
                    for (const int64_t blocksize : {int64_t{32}, int64_t{64}, int64_t{1024}}) {
                        const int64_t blocks = blocks_of(n, blocksize), spans = blocks_of(n, fourbit_span);
                        fill(values_of<T>(), n, kind, random);
                        // A code's own values, and what lies half-way between two.
                        const float* code = fourbit == Fourbit::NF4 ? FourbitOf<Fourbit::NF4>::all.value
                                                                    : FourbitOf<Fourbit::FP4>::all.value;
                        if (kind == Kind::Plain)
                            for (int64_t i = 0; i < n; ++i) {
                                const float a = code[random.below(16)], b = code[random.below(16)];
                                values_of<T>()[i] = from_float<T>(i % 64 == 3 ? 1.0f : (a + b) / 2);
                            }
                        bytes[0][n / 2] = 0;
                        kernels.quantize_4bit({values_of<T>(), bytes[0], scales, n, blocksize, storage_of<T>, fourbit},
                                              0, spans);
                        put(bytes[0], (n + 1) / 2);
                        put(scales, blocks);
                        kernels.dequantize_4bit({bytes[0], scales, code, results_of<T>(), n, blocksize, storage_of<T>},
                                                0, spans);
                        put(results_of<T>(), n);
                    }
    });
}

void gemv_case(const Kernels& kernels) {
    Random random{6};
    each_type([&](auto type) {
        using T = typename decltype(type)::type;
        for (const int64_t columns : {int64_t{96}, int64_t{128}, int64_t{640}, int64_t{129}})
            for (const int64_t blocksize : {int64_t{32}, int64_t{64}, int64_t{128}, int64_t{4096}}) {
                const int64_t rows = 7;
                fill_bits(bytes[0], rows * columns, random);
                fill(scales, blocks_of(rows * columns, blocksize), Kind::Plain, random);
                fill(floats[0], columns, Kind::Wide, random);
                const bool whole = columns % gemv_group == 0;
                const Gemv4Job job{floats[0],       bytes[0], scales,  FourbitOf<Fourbit::NF4>::all.value,
                                   results_of<T>(), rows,     columns, blocksize,
                                   storage_of<T>,   whole};
                kernels.gemv_4bit(job, 0, rows);
                put(results_of<T>(), rows);
            }
    });
}

void int8_case(const Kernels& kernels) {
    Random random{7};
    constexpr int64_t rows = 9;
    int8_t* codes = reinterpret_cast<int8_t*>(bytes[0]);
    each_type([&](auto type) {
        using T = typename decltype(type)::type;
        for (const Kind kind : kinds)
            for (const int64_t columns : {int64_t{1}, int64_t{63}, int64_t{64}, int64_t{200}})
                for (const float threshold : {float_of(inf_bits), 1.5f}) {
                    const int64_t n = rows * columns;
                    fill(values_of<T>(), n, kind, random);
                    uint8_t* outliers = threshold < 2 ? bytes[1] : nullptr;
                    std::memset(bytes[1], 0, static_cast<size_t>(columns));
                    const Int8QuantizeJob job{values_of<T>(), codes,   scales,    outliers,
                                              rows,           columns, threshold, storage_of<T>};
                    if (outliers != nullptr) kernels.int8_outliers(job, 0, rows);
                    kernels.int8_rows(job, 0, rows);
                    put(bytes[1], columns);
                    put(codes, n);
                    put(scales, rows);
                    kernels.int8_dequantize({codes, scales, floats[0], rows, columns}, 0, rows);
                    put(floats[0], n);
                    const Int8ColumnsJob of_columns{values_of<T>(), codes,     scales,       rows,
                                                    columns,        threshold, storage_of<T>};
                    kernels.int8_columns(of_columns, 0, blocks_of(columns, 64));
                    put(codes, n);
                    put(scales, columns);
                    kernels.int8_product({codes, codes, numbers, rows, rows, columns}, 0, rows);
                    put(numbers, rows * rows);
                    fill(scales, 2 * rows, Kind::Plain, random);
                    const float* bias = columns % 2 == 0 ? nullptr : scales;
                    kernels.int8_scale(
                        {numbers, scales, scales + rows, bias, results_of<T>(), rows, rows, storage_of<T>}, 0, rows);
                    put(results_of<T>(), rows * rows);
                }
    });
}

}  // namespace optim8
