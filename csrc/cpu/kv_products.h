// Products of unsigned codes and signed bytes for kv_attention_body.h, over a vocabulary V of kv_lanes_*.h.
//
// Both products of attention have one form, a sum over quads of four codes in the bytes of a word:
//
//     scores    words are four codes of one key, columns the 64 tokens of a page   (rows transposed word by word)
//     outputs   words are one element of four values, columns the elements         (rows interleaved byte by byte)
//
// A word of packed bytes has 8 / b such quads of codes. Packed words are moved, 4 KB of 4 bits at a head_dim of 128, and
// got apart by shifts between the products.
//
// Of 3 bits, a byte of the high plane has the high bits of two bytes of the low one, in its nibbles. So words of the low
// plane come in pairs, one of even and one of odd bytes, and one word of the high plane is for both.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kv_attention.h"

namespace bitpalette {
namespace {

#define BITPALETTE_INLINE __attribute__((always_inline))

// f(integral_constant 0), .. f(integral_constant N - 1)
template <class F, int... I>
BITPALETTE_INLINE inline void repeat(F&& f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
BITPALETTE_INLINE inline void repeat(F&& f) {
    repeat(f, std::make_integer_sequence<int, N>{});
}

// Lines of the next page, asked for between products: cores have 10 to 16 buffers for lines on their way, a page of 4
// bits has 128 lines, and asking for all at once waits for most of them.
struct KvAhead {
    struct Run { // of lines
        const uint8_t* at;
        int64_t step; // 0: nothing is left
        BITPALETTE_INLINE void ask() {
            __builtin_prefetch(at, 0, 3);
            at += step;
        }
    };
    struct Bytes {
        const uint8_t *at, *end;
    } now, then;

    // Of `lines` or a few more; one that a step of loops asks for, without branches.
    inline Run next(int64_t lines) {
        if (now.at >= now.end)
            now = then, then.at = then.end;
        if (now.at >= now.end)
            return {reinterpret_cast<const uint8_t*>(this), 0};
        const Run run{now.at, 64};
        now.at += 64 * lines;
        return run;
    }
    inline void rest() {
        for (Run run = next(1); run.step != 0; run = next(1))
            run.ask();
    }
};

// Quad `Which` of codes in the words x; of 3 bits with the words of the high plane, x of their low (Odd = 0) or high
// nibbles.
template <class V, int Bits, int Which, int Odd = 0>
BITPALETTE_INLINE inline typename V::Ints quad_of(typename V::Ints x, typename V::Ints high) {
    if constexpr (Bits == 8)
        return V::signed_bytes ? V::flip_signs(x) : x;
    else if constexpr (Bits == 4)
        return V::both(V::template right<4 * Which>(x), 0x0F0F0F0F);
    else {
        const typename V::Ints low = V::both(V::template right<2 * Which>(x), 0x03030303);
        return Bits == 2 ? low : V::with_bits_of(low, V::template right<4 * Odd + Which - 2>(high), 0x04040404);
    }
}

// Words of the low plane to a word of the high one, side by side in a loop.
template <int Bits>
constexpr int kv_paired = Bits == 3 ? 2 : 1;

// 64 rows of `bytes` -> words [ceil(bytes / 4), 64]; paired: pairs of words of even and of odd bytes of eight.
template <class V, bool Paired>
inline void transpose_rows(const uint8_t* rows, int64_t stride, int64_t bytes, uint32_t* words, KvAhead& ahead) {
    for (int64_t t = 0; t < kv_page; t += V::lanes) {
        const uint8_t* from = rows + t * stride;
        KvAhead::Run run = ahead.next(bytes / 16);
        int64_t k = 0;
        for (; k + 16 <= bytes; k += 16) {
            V::template transpose<Paired>(from + k, stride, words + k / 4 * kv_page + t);
            run.ask();
        }
        if (k < bytes)
            V::template transpose_part<Paired>(from + k, stride, static_cast<int>(bytes - k),
                                               words + k / 4 * kv_page + t);
    }
}

// Sums of R rows of x [R, x_row] with C registers of tokens: words [pairs * kv_paired, 64], then done(sums).
template <class V, int Bits, int R, int C, class F>
inline void score_tile(const uint32_t* words, const uint32_t* high, int64_t pairs, const int8_t* x, int64_t x_row,
                       KvAhead& ahead, F&& done) {
    constexpr int each = kv_codes_of_byte(Bits), paired = kv_paired<Bits>;
    typename V::Ints sum[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c)
            sum[r][c] = V::all_ints(0);
    KvAhead::Run run = ahead.next(2 * pairs);
    for (int64_t k = 0; k < pairs; ++k, x += 4 * each * paired) {
        run.ask();
        run.ask();
        repeat<paired>([&](auto odd) BITPALETTE_INLINE {
            typename V::Ints word[C], top[C];
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) {
                word[c] = V::load_ints(words + (k * paired + odd) * kv_page + c * V::lanes);
                top[c] = Bits == 3 ? V::load_ints(high + k * kv_page + c * V::lanes) : word[c];
            }
            repeat<each>([&](auto s) BITPALETTE_INLINE {
                typename V::Ints code[C];
#pragma GCC unroll 8
                for (int c = 0; c < C; ++c)
                    code[c] = quad_of<V, Bits, s, odd>(word[c], top[c]);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    int32_t four;
                    std::memcpy(&four, x + r * x_row + 4 * (odd * each + s), sizeof four);
                    const typename V::Ints all = V::all_ints(four);
#pragma GCC unroll 8
                    for (int c = 0; c < C; ++c)
                        sum[r][c] = V::template dot<Bits == 8>(sum[r][c], code[c], all);
                }
            });
        });
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

// Sums over a page of R rows of x [R, 64] with quads First..First + Q - 1 of W registers of words [16, columns], then
// done(sums [R][W * Q]). start [R]: what sums begin with. Odd: the words' nibbles of high [16, high_columns].
template <class V, int Bits, int R, int W, int First, int Q, int Odd, class F>
inline void output_tile(const uint32_t* words, int64_t columns, const uint32_t* high, int64_t high_columns,
                        const int8_t* x, const int32_t* start, KvAhead& ahead, F&& done) {
    typename V::Ints sum[R][W * Q];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < W * Q; ++c)
            sum[r][c] = V::all_ints(start[r]);
    KvAhead::Run run = ahead.next(kv_page / 4);
    for (int64_t k = 0; k < kv_page / 4; ++k) {
        run.ask();
        typename V::Ints code[W * Q];
        repeat<W>([&](auto w) BITPALETTE_INLINE {
            const typename V::Ints word = V::load_ints(words + k * columns + w * V::lanes);
            const typename V::Ints top = Bits == 3 ? V::load_ints(high + k * high_columns + w * V::lanes) : word;
            repeat<Q>([&](auto q) BITPALETTE_INLINE { code[w * Q + q] = quad_of<V, Bits, First + q, Odd>(word, top); });
        });
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            int32_t four;
            std::memcpy(&four, x + r * kv_page + 4 * k, sizeof four);
            const typename V::Ints all = V::all_ints(four);
#pragma GCC unroll 8
            for (int c = 0; c < W * Q; ++c)
                sum[r][c] = V::template dot<Bits == 8>(sum[r][c], code[c], all);
        }
    }
    typename V::Ints total[R][W * Q]; // a copy, as above
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < W * Q; ++c)
            total[r][c] = sum[r][c];
    done(total);
}

// Registers of columns to R rows: as many sums as there are registers for.
template <class V, int R>
constexpr int tile_columns = V::tile_sums / R >= 4 ? 4 : V::tile_sums / R >= 2 ? 2 : 1;

// body(first, integral_constant R) for `rows` rows in tiles of at most V::tile_rows, R of multiples of Step.
template <class V, int Step, class F>
inline void tiles_of(int64_t rows, F&& body) {
    int64_t row = 0;
    const auto take = [&](auto count) {
        constexpr int R = decltype(count)::value;
        if constexpr (R % Step == 0 && R <= V::tile_rows)
            for (; rows - row >= R; row += R)
                body(row, count);
    };
    take(std::integral_constant<int, 8>{});
    take(std::integral_constant<int, 6>{});
    take(std::integral_constant<int, 4>{});
    take(std::integral_constant<int, 3>{});
    take(std::integral_constant<int, 2>{});
    take(std::integral_constant<int, 1>{});
}

// done(row, token, sums[R][C]) for x [rows, x_row], over all 64 tokens.
template <class V, int Bits, class F>
inline void score_products(const uint32_t* words, const uint32_t* high, int64_t pairs, const int8_t* x, int64_t x_row,
                           int64_t rows, KvAhead& ahead, F&& done) {
    tiles_of<V, 1>(rows, [&](int64_t row, auto count) {
        constexpr int R = decltype(count)::value, C = tile_columns<V, R>;
        for (int64_t t = 0; t < kv_page; t += C * V::lanes)
            score_tile<V, Bits, R, C>(words + t, high + t, pairs, x + row * x_row, x_row, ahead,
                                      [&](auto& sum) { done(row, t, sum); });
    });
}

// done(row, column, sums[R], n, between) for x [rows, 64]: n registers of sums, the first of column `column` and one
// every `between`. columns of words, a multiple of 16; of those of 3 bits, the first half are even bytes.
template <class V, int Bits, class F>
inline void output_products(const uint32_t* words, int64_t columns, const uint32_t* high, const int8_t* x,
                            const int32_t* start, int64_t rows, KvAhead& ahead, F&& done) {
    constexpr int each = kv_codes_of_byte(Bits), halves = kv_paired<Bits>;
    const int64_t half = columns / halves;
    tiles_of<V, 2>(rows, [&](int64_t row, auto count) {
        constexpr int R = decltype(count)::value, C = tile_columns<V, R>, Q = each < C ? each : C, W = C / Q;
        repeat<halves>([&](auto odd) {
            const auto tile = [&](int64_t column, auto w, auto first) {
                constexpr int registers = decltype(w)::value, quad = decltype(first)::value;
                output_tile<V, Bits, R, registers, quad, Q, odd>(
                    words + odd * half + column, columns, high + column, half, x + row * kv_page, start + row, ahead,
                    [&](auto& sum) {
                        const int64_t at = quad * columns + odd * half + column;
                        for (int i = 0; i < registers; ++i)
                            for (int q = 0; q < Q; ++q)
                                done(row, at + q * columns + i * V::lanes, sum, i * Q + q);
                    });
            };
            repeat<each / Q>([&](auto part) {
                constexpr std::integral_constant<int, part * Q> first{};
                int64_t column = 0;
                for (; column + W * V::lanes <= half; column += W * V::lanes)
                    tile(column, std::integral_constant<int, W>{}, first);
                for (; column < half; column += V::lanes)
                    tile(column, std::integral_constant<int, 1>{}, first);
            });
        });
    });
}

} // namespace
} // namespace bitpalette
