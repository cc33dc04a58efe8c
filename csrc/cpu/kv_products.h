// Products of unsigned codes and signed bytes for kv_attention_body.h, over a vocabulary V of kv_lanes_*.h.
//
// Both products of attention have one form, a sum over quads of four codes in the bytes of a word:
//
//     scores    words are four codes of one key, columns the 64 tokens of a page   (rows transposed word by word)
//     outputs   words are one element of four values, columns the elements         (rows interleaved byte by byte)
//
// A word of packed bytes has 8 / b such quads of codes, got apart by shifts: packed words are moved first and expanded
// then, so that what is moved is small.
#pragma once

#include <cstdint>
#include <cstring>

#include "kv_attention.h"

namespace bitpalette {
namespace {

// Quad `Which` of codes in the words x; of 3 bits with the words of the high bits' nibbles.
template <class V, int Bits, int Which>
inline typename V::Ints quad_of(typename V::Ints x, typename V::Ints high) {
    if constexpr (Bits == 8)
        return V::signed_bytes ? V::flip_signs(x) : x;
    else if constexpr (Bits == 4)
        return V::both(V::template right<4 * Which>(x), 0x0F0F0F0F);
    else if constexpr (Bits == 2)
        return V::both(V::template right<2 * Which>(x), 0x03030303);
    else
        return V::either(V::both(V::template right<2 * Which>(x), 0x03030303),
                         V::both(V::template right<Which - 2>(high), 0x04040404));
}

// codes [outer, 8 / b, inner] of words [outer, inner].
template <class V, int Bits>
inline void expand(const uint32_t* words, const uint32_t* high, int64_t outer, int64_t inner, uint32_t* codes) {
    constexpr int each = kv_codes_of_byte(Bits);
    for (int64_t o = 0; o < outer; ++o)
        for (int64_t i = 0; i < inner; i += V::lanes) {
            const typename V::Ints x = V::load_ints(words + o * inner + i);
            const typename V::Ints h = Bits == 3 ? V::load_ints(high + o * inner + i) : x;
            uint32_t* to = codes + o * each * inner + i;
            V::store_ints(to, quad_of<V, Bits, 0>(x, h));
            if constexpr (each > 1)
                V::store_ints(to + inner, quad_of<V, Bits, 1>(x, h));
            if constexpr (each > 2) {
                V::store_ints(to + 2 * inner, quad_of<V, Bits, 2>(x, h));
                V::store_ints(to + 3 * inner, quad_of<V, Bits, 3>(x, h));
            }
        }
}

// 64 rows of `bytes` -> words [ceil(bytes / 4), 64]. next: what is read after these rows.
template <class V>
inline void transpose_rows(const uint8_t* rows, int64_t stride, int64_t bytes, const uint8_t* next, uint32_t* words) {
    for (int64_t t = 0; t < kv_page; t += V::lanes) {
        const uint8_t* from = rows + t * stride;
        int64_t k = 0;
        for (; k + 16 <= bytes; k += 16)
            V::transpose(from + k, stride, words + k / 4 * kv_page + t);
        if (k < bytes)
            V::transpose_part(from + k, stride, static_cast<int>(bytes - k), words + k / 4 * kv_page + t);
        if (next != nullptr)
            for (int64_t i = 0; i < V::lanes * stride; i += 64)
                __builtin_prefetch(next + t * stride + i, 0, 3);
    }
}

// 64 rows of `bytes` -> words [16, columns], one of four rows and a byte each.
template <class V>
inline void interleave_rows(const uint8_t* rows, int64_t stride, int64_t bytes, const uint8_t* next, int64_t columns,
                            uint32_t* words) {
    for (int64_t t = 0; t < kv_page; t += 4) {
        V::interleave(rows + t * stride, stride, bytes, words + t / 4 * columns);
        if (next != nullptr)
            for (int64_t i = 0; i < 4 * stride; i += 64)
                __builtin_prefetch(next + t * stride + i, 0, 3);
    }
}

// Rows 0..R-1 of x with C registers of columns, then done(sums).
template <class V, bool Wide, int R, int C, class F>
inline void product_tile(const uint32_t* codes, int64_t columns, int64_t quads, const int8_t* x, int64_t x_row,
                         const int32_t* start, F&& done) {
    typename V::Ints sum[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c)
            sum[r][c] = V::all_ints(start == nullptr ? 0 : start[r]);
    for (int64_t k = 0; k < quads; ++k) {
        typename V::Ints code[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c)
            code[c] = V::load_ints(codes + k * columns + c * V::lanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            int32_t four;
            std::memcpy(&four, x + r * x_row + 4 * k, sizeof four);
            const typename V::Ints all = V::all_ints(four);
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c)
                sum[r][c] = V::template dot<Wide>(sum[r][c], code[c], all);
        }
    }
    // a copy: gcc 12 moves sums whose address is taken between registers in the loop above
    typename V::Ints total[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c)
            total[r][c] = sum[r][c];
    done(total);
}

// done(row, column, sums[R][C]) for all of x [rows, x_row] and codes [quads, columns]: rows in steps of R, which has
// to divide them.
template <class V, bool Wide, int R, class F>
inline void products(const uint32_t* codes, int64_t columns, int64_t quads, const int8_t* x, int64_t x_row,
                     const int32_t* start, int64_t begin, int64_t end, F&& done) {
    constexpr int C = V::tile_columns;
    for (int64_t row = begin; row < end; row += R) {
        const int32_t* from = start == nullptr ? nullptr : start + row;
        int64_t column = 0;
        for (; column + C * V::lanes <= columns; column += C * V::lanes)
            product_tile<V, Wide, R, C>(codes + column, columns, quads, x + row * x_row, x_row, from,
                                        [&](auto& sum) { done(row, column, sum); });
        for (; column < columns; column += V::lanes)
            product_tile<V, Wide, R, 1>(codes + column, columns, quads, x + row * x_row, x_row, from,
                                        [&](auto& sum) { done(row, column, sum); });
    }
}

} // namespace
} // namespace bitpalette
