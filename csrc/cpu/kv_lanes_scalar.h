// What kv_products.h needs beyond float lanes, in portable code.
#pragma once

#include "float_lanes_scalar.h"

namespace bitpalette {
namespace {

struct KvScalar : Scalar {
    struct Ints {
        uint32_t at[lanes];
    };
    static constexpr int tile_rows = 2, tile_sums = 4;
    static constexpr bool signed_bytes = false;

    static Ints all_ints(int32_t i) {
        Ints all;
        for (uint32_t& x : all.at)
            x = static_cast<uint32_t>(i);
        return all;
    }
    static Ints load_ints(const void* from) {
        Ints i;
        std::memcpy(i.at, from, sizeof i.at);
        return i;
    }
    static void store_ints(void* to, const Ints& i) { std::memcpy(to, i.at, sizeof i.at); }
    template <int Shift>
    static Ints right(Ints i) {
        for (uint32_t& x : i.at)
            x = Shift >= 0 ? x >> (Shift >= 0 ? Shift : 0) : x << (Shift < 0 ? -Shift : 0);
        return i;
    }
    static Ints both(Ints i, uint32_t mask) {
        for (uint32_t& x : i.at)
            x &= mask;
        return i;
    }
    static Ints with_bits_of(Ints low, const Ints& x, uint32_t mask) {
        for (int i = 0; i < lanes; ++i)
            low.at[i] |= x.at[i] & mask;
        return low;
    }
    static Ints flip_signs(Ints i) { return i; }
    template <bool Wide>
    static Ints dot(Ints sum, const Ints& codes, const Ints& x) {
        for (int i = 0; i < lanes; ++i)
            for (int byte = 0; byte < 4; ++byte) {
                const int32_t code = static_cast<int32_t>(codes.at[i] >> 8 * byte & 255);
                sum.at[i] += static_cast<uint32_t>(code * static_cast<int8_t>(x.at[i] >> 8 * byte & 255));
            }
        return sum;
    }
    static Ints combined(Ints high, const Ints& low) {
        for (int i = 0; i < lanes; ++i)
            high.at[i] = (high.at[i] << 8) + low.at[i];
        return high;
    }
    static Floats to_floats(const Ints& n) {
        Floats f;
        for (int i = 0; i < lanes; ++i)
            f.at[i] = static_cast<float>(static_cast<int32_t>(n.at[i]));
        return f;
    }
    static void store_bytes(int8_t* to, const Floats& whole) {
        for (int i = 0; i < lanes; ++i)
            to[i] = static_cast<int8_t>(whole.at[i]);
    }

    // words [4, 64] (columns 0..7) of 16 bytes of 8 rows; paired: of the even bytes of eight, then of the odd ones
    template <bool Paired>
    static void transpose(const uint8_t* rows, int64_t stride, uint32_t* to) {
        transpose_part<Paired>(rows, stride, 16, to);
    }
    template <bool Paired>
    static void transpose_part(const uint8_t* rows, int64_t stride, int bytes, uint32_t* to) {
        const int words = Paired ? (bytes + 7) / 8 * 2 : (bytes + 3) / 4;
        for (int word = 0; word < words; ++word)
            for (int row = 0; row < lanes; ++row) {
                uint32_t x = 0;
                for (int i = 0; i < 4; ++i) {
                    const int byte = Paired ? 8 * (word / 2) + 2 * i + word % 2 : 4 * word + i;
                    x |= byte < bytes ? static_cast<uint32_t>(rows[row * stride + byte]) << 8 * i : 0;
                }
                to[64 * word + row] = x;
            }
    }

    // words [2, columns] of four rows each, of eight rows of `bytes`
    static void interleave(const uint8_t* rows, int64_t stride, int64_t bytes, int64_t columns, uint32_t* to) {
        every_byte(rows, stride, bytes, 1, columns, columns, to);
    }
    // low [2, columns]: words of even bytes, then those of odd ones; high [2, columns / 2]: words of the bytes after
    // the first plane's
    static void interleave_planes(const uint8_t* rows, int64_t stride, int64_t bytes, int64_t columns, uint32_t* low,
                                  uint32_t* high) {
        every_byte(rows, stride, bytes / 2, 2, columns / 2, columns, low);
        every_byte(rows + 1, stride, bytes / 2, 2, columns / 2, columns, low + columns / 2);
        every_byte(rows + bytes, stride, bytes / 2, 1, columns / 2, columns / 2, high);
    }

  private:
    // words [2, columns], `apart` words from one to the other, of `bytes` bytes that are `step` apart
    static void every_byte(const uint8_t* rows, int64_t stride, int64_t bytes, int64_t step, int64_t columns,
                           int64_t apart, uint32_t* to) {
        for (int half = 0; half < 2; ++half, rows += 4 * stride, to += apart)
            for (int64_t k = 0; k < columns; ++k) {
                to[k] = 0;
                for (int row = 0; row < 4 && k < bytes; ++row)
                    to[k] |= static_cast<uint32_t>(rows[row * stride + k * step]) << 8 * row;
            }
    }
};

} // namespace
} // namespace bitpalette
