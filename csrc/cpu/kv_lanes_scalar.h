// What kv_products.h needs beyond float lanes, in portable code.
#pragma once

#include "float_lanes_scalar.h"

namespace bitpalette {
namespace {

struct KvScalar : Scalar {
    struct Ints {
        uint32_t at[lanes];
    };
    static constexpr int tile_rows = 2, tile_columns = 2;
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
    static Ints either(Ints a, const Ints& b) {
        for (int i = 0; i < lanes; ++i)
            a.at[i] |= b.at[i];
        return a;
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

    // words [4, 64] (columns 0..7) of 16 bytes of 8 rows
    static void transpose(const uint8_t* rows, int64_t stride, uint32_t* to) { transpose_part(rows, stride, 16, to); }
    static void transpose_part(const uint8_t* rows, int64_t stride, int bytes, uint32_t* to) {
        for (int word = 0; 4 * word < bytes; ++word)
            for (int row = 0; row < lanes; ++row) {
                uint32_t x = 0;
                for (int i = 0; i < 4 && 4 * word + i < bytes; ++i)
                    x |= static_cast<uint32_t>(rows[row * stride + 4 * word + i]) << 8 * i;
                to[64 * word + row] = x;
            }
    }

    // words [bytes in steps of 16] of four rows
    static void interleave(const uint8_t* rows, int64_t stride, int64_t bytes, uint32_t* to) {
        const int64_t columns = (bytes + 15) / 16 * 16;
        for (int64_t k = 0; k < columns; ++k) {
            to[k] = 0;
            for (int row = 0; row < 4 && k < bytes; ++row)
                to[k] |= static_cast<uint32_t>(rows[row * stride + k]) << 8 * row;
        }
    }

    // the low and the high four bits of each byte as bytes of their own
    static void nibbles(const uint8_t* from, int64_t bytes, uint8_t* to) {
        for (int64_t i = 0; i < bytes; ++i) {
            to[2 * i] = from[i] & 15;
            to[2 * i + 1] = from[i] >> 4;
        }
    }
};

} // namespace
} // namespace bitpalette
