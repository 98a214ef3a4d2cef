// The tables of a step in shared memory, in columns: each lane reads its own, so that lanes that look up different
// entries do not wait for each other, and an entry's address takes one instruction.
#pragma once

#include "cuda/shared.h"
#include "cuda/tables.h"

OPTIM8_BEGIN

// A byte is put into an address as its second byte, and so a row is 256 bytes. Values by code have a column for each
// bank. The lines of dithered rounding are by the upper byte of a quotient as float16, which has its exponent; accesses
// of 16 bytes are made for 8 lanes at a time, and so they have 8 columns. Beside another lie Signed and Positive.
constexpr uint32_t row_bytes = 256;
constexpr uint32_t value_bytes = code_size * row_bytes, column_bytes = warp_size * sizeof(float);
constexpr uint32_t line_rows = 128, line_bytes = line_rows * row_bytes, line_columns = 8;
static_assert(2 * column_bytes == row_bytes && 2 * line_columns * sizeof(uint4) == row_bytes);
OPTIM8_HD constexpr int column_of(Code code) { return is_signed(code) ? 0 : 1; }

// Before the tables: which blocks of values are the thread block's share, a word for each of its warps, and a bit for
// each of those blocks that is left over.
constexpr uint32_t share_bytes = 256, mark_bytes = 16 * 1024 - share_bytes;
constexpr int64_t most_marks = 8 * mark_bytes;

// Values begin at a multiple of their size, and lines end there. What a launch asks for is enough wherever up to a
// quarter of this is taken already.
constexpr uint32_t columns_bytes = 2 * value_bytes;
static_assert(share_bytes + mark_bytes + line_bytes + value_bytes / 4 <= value_bytes);
OPTIM8_DEVICE uint32_t values_address() {
    return (dynamic_address() + share_bytes + mark_bytes + line_bytes + value_bytes - 1) & ~(value_bytes - 1);
}

// Quotients are scaled, so that those of all zones are normal numbers of float16.
constexpr int quotient_exponent = 8;
constexpr float quotient_scale = 1 << quotient_exponent;

// The line of the quotients with this upper byte. Below the lowest zone it is the lowest's, which leads to 0.
template <Code code>
OPTIM8_DEVICE uint4 line_of_row(const DitherTables& t, int row) {
    constexpr int bias = 127 - 15, highest_binade = lowest_binade + zones * binades_of_zone - 1;
    const int exponent = row / 4 + bias - quotient_exponent;
    const int at = (exponent < lowest_binade ? lowest_binade : minimum(exponent, highest_binade)) & 31;
    return uint4{bits_of(t.slope[at] / quotient_scale), bits_of(t.offset[at]), t.last[at], 0};
}

// By all threads of a block. A share has `blocks` blocks of values, and the first shares `larger` one more.
template <int threads>
OPTIM8_DEVICE void fill_columns(uint32_t blocks, uint32_t larger) {
    const uint32_t values = values_address(), lines = values - line_bytes, thread = threadIdx.x;
    if (thread == 0) {
        const uint32_t begin = blocks * blockIdx.x + minimum(blockIdx.x, larger);
        store_shared(dynamic_address(), uint4{begin, begin + blocks + (blockIdx.x < larger ? 1 : 0), 0, 0});
    }
    for (uint32_t i = thread; i < mark_bytes / sizeof(uint4); i += threads)
        store_shared(dynamic_address() + share_bytes + i * sizeof(uint4), uint4{0, 0, 0, 0});
    for (uint32_t i = thread; i < value_bytes / sizeof(uint4); i += threads) {
        const uint32_t column = i / (column_bytes / sizeof(uint4)), code = column / 2;
        const uint32_t value = bits_of(column % 2 == 0 ? decode<Code::Signed>(code) : decode<Code::Positive>(code));
        store_shared(values + i * sizeof(uint4), uint4{value, value, value, value});
    }
    for (uint32_t i = thread; i < line_bytes / sizeof(uint4); i += threads) {
        const uint32_t column = i / line_columns;
        const int row = static_cast<int>(column / 2);
        store_shared(lines + i * sizeof(uint4), column % 2 == 0 ? line_of_row<Code::Signed>(signed_dither, row)
                                                                : line_of_row<Code::Positive>(positive_dither, row));
    }
    __syncthreads();
}

// Read where they are needed, and kept in no register.
OPTIM8_DEVICE int share_begin() { return static_cast<int>(load_shared(dynamic_address())); }
OPTIM8_DEVICE int share_end() { return static_cast<int>(load_shared(dynamic_address() + 4)); }

// A word of a warp, while none of its registers is free for it.
enum class WarpWord { Row, FirstMark };
OPTIM8_DEVICE uint32_t address_of(WarpWord word) {
    return dynamic_address() +
           static_cast<uint32_t>(sizeof(uint4) + threadIdx.x / warp_size * 8 + static_cast<uint32_t>(word) * 4);
}
OPTIM8_DEVICE void set_word(WarpWord word, uint32_t x) {
    __syncwarp();  // every lane has read what was there
    if (lane() == 0) store_shared(address_of(word), x);
    __syncwarp();
}
OPTIM8_DEVICE uint32_t get_word(WarpWord word) { return load_shared(address_of(word)); }

OPTIM8_DEVICE uint32_t mark_address(uint32_t mark) { return dynamic_address() + share_bytes + mark / 32 * 4; }
OPTIM8_DEVICE void set_mark(uint32_t mark) { or_shared(mark_address(mark), 1u << mark % 32); }
OPTIM8_DEVICE bool is_marked(uint32_t mark) { return (load_shared(mark_address(mark)) >> mark % 32 & 1) != 0; }

// Where the lane's columns are, in one register: the address of its values, and in the byte of it that a code replaces,
// the lowest byte of that of its lines.
struct LaneColumns {
    uint32_t at = values_address() + static_cast<uint32_t>(lane()) * sizeof(float) +
                  static_cast<uint32_t>(lane()) % line_columns * sizeof(uint4) * row_bytes;
    OPTIM8_DEVICE LaneColumns() { keep_in_register(at); }
};

// The value of a lane's k-th code.
template <Code code>
OPTIM8_DEVICE float decode_column(const uint32_t (&codes)[per_lane / 4], int k, const LaneColumns& columns) {
    return shared_float(__byte_perm(codes[k / 4], columns.at, 0x7604 | (k % 4) << 4) + column_of(code) * column_bytes);
}

// What stands for DitherTables: the fields of the line at an address, all of them by one access.
template <int field>
struct LineField {};
template <int field>
OPTIM8_DEVICE auto of_binade(LineField<field>, uint32_t address) {
    const uint4 line = shared_packet(address);
    if constexpr (field == 0)
        return float_of(line.x);
    else if constexpr (field == 1)
        return float_of(line.y);
    else
        return line.z;
}
struct LineFields {
    LineField<0> slope;
    LineField<1> offset;
    LineField<2> last;
};

// core/dither.h's encode_quotient of two scaled quotients.
template <Code code>
OPTIM8_DEVICE void encode_columns(float (&y)[2], const uint32_t (&u)[2], const LaneColumns& columns, uint32_t* to) {
    constexpr float lowest = DitherTablesOf<code>::all.lowest * quotient_scale;
    constexpr uint32_t offset = column_of(code) * line_columns * uint32_t{sizeof(uint4)} - line_bytes;
    if constexpr (!is_signed(code))
        for (float& of : y) of = maximum(of, lowest);
    const uint32_t halves = half_pair(y[0], y[1]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t line = __byte_perm(halves, columns.at, i == 0 ? 0x7615 : 0x7635) + offset;
        to[i] = encode_quotient<code>(y[i], y[i], line, u[i], LineFields{});
    }
}

OPTIM8_END
