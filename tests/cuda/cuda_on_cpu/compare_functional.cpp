#include "compare.h"
#include "core/codec.h"

#include <algorithm>

namespace optim8 {
namespace {

constexpr int64_t sizes[] = {0, 1, 31, 255, 256, 257, 1000, 4096, 9001};

std::string describe(const char* what, const char* type, int64_t size, int64_t blocksize, int64_t offset) {
    return std::string(what) + " " + type + " size " + std::to_string(size) + " blocksize " +
           std::to_string(blocksize) + " offset " + std::to_string(offset);
}

// 256 sorted values that are no dynamic map.
std::vector<float> other_map() {
    std::vector<float> map;
    for (int i = 0; i < code_size; ++i) map.push_back(static_cast<float>(i - 128) / 127.0f);
    return map;
}

struct Map {
    CodeKind kind;
    std::vector<float> values, middle;
};
std::vector<Map> maps() {
    const auto values = [](const CodeTables& t) { return std::vector<float>(t.value, t.value + code_size); };
    std::vector<Map> all = {{CodeKind::Signed, values(Tables<Code::Signed>::all), {}},
                            {CodeKind::Unsigned, values(Tables<Code::Unsigned>::all), {}},
                            {CodeKind::Positive, values(Tables<Code::Unsigned>::all), {}},
                            {CodeKind::Any, other_map(), {}}};
    for (Map& map : all)
        for (int i = 0; i + 1 < code_size; ++i) map.middle.push_back(midpoint(map.values[i], map.values[i + 1]));
    return all;
}

template <class T>
void compare_blocks(const Map& map, Kind kind, int64_t size, int64_t blocksize, int64_t offset) {
    const std::string what = describe("quantize", name_of<T>(), size, blocksize, offset) + " map " +
                             std::to_string(static_cast<int>(map.kind)) + " kind " +
                             std::to_string(static_cast<int>(kind));
    Buffer<T> values(size, offset);
    fill(values, kind);
    const int64_t blocks = blocks_of(size, blocksize);
    Buffer<uint8_t> codes(size, offset), expected_codes(size, offset);
    Buffer<float> absmax(blocks), expected_absmax(blocks), info(code_info_size);
    const Buffer<float> code = buffer_of(map.values.data(), code_size);
    QuantizeJob job{values.data(), codes.data(), absmax.data(), code.data(), map.middle.data(),
                    size,          blocksize,    storage_of<T>, map.kind};
    QuantizeJob on_cpu = job;
    on_cpu.codes = expected_codes.data();
    on_cpu.absmax = expected_absmax.data();
    scalar::quantize_blocks(on_cpu, 0, blocks);
    if (map.kind != CodeKind::Positive) job.kind = CodeKind::Any;  // it finds out by itself
    cuda_quantize(job, info.data(), nullptr);
    expect_same(what + " codes", codes, expected_codes);
    expect_same(what + " absmax", absmax, expected_absmax);

    Buffer<T> out(size, offset), expected_out(size, offset);
    fill_codes(codes);
    DequantizeJob back{codes.data(), absmax.data(), code.data(), out.data(), size, blocksize, storage_of<T>, map.kind};
    cuda_dequantize(back, nullptr);
    back.out = expected_out.data();
    scalar::dequantize_blocks(back, 0, blocks);
    expect_same("de" + what, out, expected_out);
}

// Every 65521st float32 in [0, 1], and all around the thresholds of both codes: as blocks that begin with 1.
void compare_quotients() {
    std::vector<float> quotients;
    for (uint32_t bits = 0; bits <= 0x3f800000u; bits += 65521) quotients.push_back(float_of(bits));
    for (const CodeTables* t : {&Tables<Code::Signed>::all, &Tables<Code::Unsigned>::all})
        for (float threshold : t->threshold)
            for (uint32_t bits = bits_of(threshold) - 8; bits <= std::min(bits_of(threshold) + 8, 0x3f800000u); ++bits)
                quotients.push_back(float_of(bits));
    std::vector<float> all;
    for (size_t i = 0; i < quotients.size(); ++i) {
        if (all.size() % 256 == 0) all.push_back(1.0f);
        all.push_back(i % 2 ? -quotients[i] : quotients[i]);
    }
    Buffer<float> values(static_cast<int64_t>(all.size()));
    std::copy(all.begin(), all.end(), values.data());
    for (const Map& map : maps()) {
        const int64_t blocks = blocks_of(values.size(), 256);
        Buffer<uint8_t> codes(values.size()), expected(values.size());
        Buffer<float> absmax(blocks), info(code_info_size);
        const Buffer<float> code = buffer_of(map.values.data(), code_size);
        QuantizeJob job{values.data(), codes.data(), absmax.data(),    code.data(), map.middle.data(),
                        values.size(), 256,          Storage::Float32, map.kind};
        cuda_quantize(job, info.data(), nullptr);
        job.codes = expected.data();
        scalar::quantize_blocks(job, 0, blocks);
        expect_same("quotients", codes, expected);
    }
}

template <class T>
void compare_packed(Fourbit type, Kind kind, int64_t size, int64_t blocksize, int64_t offset) {
    const std::string what = describe("quantize 4-bit", name_of<T>(), size, blocksize, offset) + " kind " +
                             std::to_string(static_cast<int>(kind));
    Buffer<T> values(size, offset);
    fill(values, kind);
    const int64_t blocks = blocks_of(size, blocksize), spans = blocks_of(size, fourbit_span);
    Buffer<uint8_t> packed((size + 1) / 2, offset), expected_packed((size + 1) / 2, offset);
    Buffer<float> absmax(blocks), expected_absmax(blocks);
    Quantize4Job job{values.data(), packed.data(), absmax.data(), size, blocksize, storage_of<T>, type};
    cuda_quantize_4bit(job, nullptr);
    job.packed = expected_packed.data();
    job.absmax = expected_absmax.data();
    scalar::quantize_4bit(job, 0, spans);
    expect_same(what + " codes", packed, expected_packed);
    expect_same(what + " absmax", absmax, expected_absmax);

    const FourbitTables& tables = type == Fourbit::NF4 ? FourbitOf<Fourbit::NF4>::all : FourbitOf<Fourbit::FP4>::all;
    Buffer<T> out(size, offset), expected_out(size, offset);
    fill_codes(packed);
    Dequantize4Job back{packed.data(), absmax.data(), tables.value, out.data(), size, blocksize, storage_of<T>};
    cuda_dequantize_4bit(back, type, nullptr);
    back.out = expected_out.data();
    scalar::dequantize_4bit(back, 0, spans);
    expect_same("de" + what, out, expected_out);
}

template <class V, class T>
void compare_gemv(int64_t rows, int64_t columns, int64_t blocksize, int64_t offset) {
    Buffer<V> vector(columns, offset);
    fill(vector, Kind::Plain);
    Buffer<uint8_t> packed((rows * columns + 1) / 2, offset);
    fill_codes(packed);
    Buffer<float> absmax(blocks_of(rows * columns, blocksize)), wide(columns);
    fill(absmax, Kind::Wide);
    const bool whole = columns % gemv_group == 0;
    for (int64_t k = 0; k < columns; ++k) wide[k] = to_float(vector[k]);
    for (int64_t at = 0; at < columns && whole; at += gemv_group)
        for (int64_t turn = 0; turn < 8; ++turn)
            for (int64_t l = 0; l < 16; ++l) wide[at + 16 * turn + l] = to_float(vector[at + gemv_order(turn, l)]);
    Buffer<T> out(rows, offset), expected(rows, offset);
    const Buffer<float> table = buffer_of(FourbitOf<Fourbit::NF4>::all.value, 16);
    cuda_gemv_4bit({vector.data(), packed.data(), absmax.data(), table.data(), out.data(), rows, columns, blocksize,
                    storage_of<V>, storage_of<T>},
                   nullptr);
    scalar::gemv_4bit({wide.data(), packed.data(), absmax.data(), table.data(), expected.data(), rows, columns,
                       blocksize, storage_of<T>, whole},
                      0, rows);
    expect_same(describe("gemv", name_of<V>(), rows, blocksize, offset) + " columns " + std::to_string(columns), out,
                expected);
}

template <class T>
void compare_int8_of(int64_t rows, int64_t columns, Kind kind, float threshold, int64_t offset) {
    const std::string what = describe("int8", name_of<T>(), rows, columns, offset) + " kind " +
                             std::to_string(static_cast<int>(kind)) + " threshold " + std::to_string(threshold);
    const int64_t size = rows * columns;
    Buffer<T> values(size, offset);
    fill(values, kind);
    Buffer<int8_t> codes(size, offset), expected_codes(size, offset);
    Buffer<float> stats(rows), expected_stats(rows);
    Buffer<uint8_t> outliers(columns), expected_outliers(columns);
    const bool finds = threshold < INFINITY;
    Int8QuantizeJob job{values.data(), codes.data(), stats.data(), finds ? outliers.data() : nullptr,
                        rows,          columns,      threshold,    storage_of<T>};
    cuda_int8_rows(job, nullptr);
    job.codes = expected_codes.data();
    job.stats = expected_stats.data();
    job.outliers = finds ? expected_outliers.data() : nullptr;
    if (finds) scalar::int8_outliers(job, 0, rows);
    scalar::int8_rows(job, 0, rows);
    expect_same(what + " rows", codes, expected_codes);
    expect_same(what + " row stats", stats, expected_stats);
    expect_same(what + " outliers", outliers, expected_outliers);

    Buffer<float> column_stats(columns), expected_column_stats(columns);
    Int8ColumnsJob by_column{values.data(), codes.data(), column_stats.data(), rows, columns, threshold, storage_of<T>};
    cuda_int8_columns(by_column, nullptr);
    by_column.codes = expected_codes.data();
    by_column.stats = expected_column_stats.data();
    scalar::int8_columns(by_column, 0, blocks_of(columns, 64));
    expect_same(what + " columns", codes, expected_codes);
    expect_same(what + " column stats", column_stats, expected_column_stats);

    Buffer<float> out(size, offset), expected_out(size, offset);
    cuda_int8_dequantize({codes.data(), stats.data(), out.data(), rows, columns}, nullptr);
    scalar::int8_dequantize({codes.data(), stats.data(), expected_out.data(), rows, columns}, 0, rows);
    expect_same(what + " dequantized", out, expected_out);

    // The rows times themselves, then scaled to T, with and without a bias.
    if (rows > 8) return;
    Buffer<int32_t> sums(rows * rows), expected_sums(rows * rows);
    cuda_int8_product({codes.data(), codes.data(), sums.data(), rows, rows, columns}, nullptr);
    scalar::int8_product({codes.data(), codes.data(), expected_sums.data(), rows, rows, columns}, 0, rows);
    expect_same(what + " product", sums, expected_sums);
    Buffer<T> scaled(rows * rows, offset), expected_scaled(rows * rows, offset);
    for (const float* bias : {static_cast<const float*>(nullptr), static_cast<const float*>(stats.data())}) {
        cuda_int8_scale({sums.data(), stats.data(), stats.data(), bias, scaled.data(), rows, rows, storage_of<T>},
                        nullptr);
        scalar::int8_scale(
            {sums.data(), stats.data(), stats.data(), bias, expected_scaled.data(), rows, rows, storage_of<T>}, 0,
            rows);
        expect_same(what + " scaled", scaled, expected_scaled);
    }
}

}  // namespace

void compare_blockwise() {
    for (const Map& map : maps())
        for (int64_t blocksize : {1, 64, 100, 128, 256, 512, 4096})
            for (int64_t size : sizes)
                each_type([&](auto stored) {
                    using T = typename decltype(stored)::type;
                    if (blocksize == 1 && size > 1000) return;
                    const auto seed = static_cast<size_t>(size + blocksize);
                    compare_blocks<T>(map, kinds[seed % 5], size, blocksize, size % 2);
                    if (blocksize == 256 || blocksize == 64)
                        for (Kind kind : kinds) compare_blocks<T>(map, kind, size, blocksize, 0);
                });
    compare_quotients();
}

void compare_fourbit() {
    for (Fourbit type : {Fourbit::NF4, Fourbit::FP4})
        for (int64_t blocksize : {32, 64, 128, 256, 512, 4096})
            for (int64_t size : sizes)
                each_type([&](auto stored) {
                    using T = typename decltype(stored)::type;
                    const auto seed = static_cast<size_t>(size + blocksize);
                    compare_packed<T>(type, kinds[seed % 5], size, blocksize, size % 2);
                    if (blocksize == 64)
                        for (Kind kind : kinds) compare_packed<T>(type, kind, size, blocksize, 0);
                });
    for (auto [rows, columns] : {std::pair<int64_t, int64_t>{1, 1}, {3, 128}, {5, 100}, {2, 256}, {7, 33}, {4, 1152}})
        for (int64_t blocksize : {32, 64, 128, 4096})
            for (int64_t offset : {0, 1})
                each_type([&](auto vector) {
                    each_type([&](auto out) {
                        compare_gemv<typename decltype(vector)::type, typename decltype(out)::type>(rows, columns,
                                                                                                    blocksize, offset);
                    });
                });
}

void compare_int8() {
    for (auto [rows, columns] :
         {std::pair<int64_t, int64_t>{0, 5}, {5, 0}, {1, 1}, {3, 100}, {2, 256}, {7, 301}, {300, 34}})
        for (float threshold : {std::numeric_limits<float>::infinity(), 2.0f})
            for (Kind kind : kinds)
                each_type([&](auto stored) {
                    compare_int8_of<typename decltype(stored)::type>(rows, columns, kind, threshold, columns % 2);
                });
}

}  // namespace optim8
