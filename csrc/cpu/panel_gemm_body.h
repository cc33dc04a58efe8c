// The inner loops of panel_gemm.h over a vocabulary V; each panel_gemm_<isa>.cpp defines V and includes this file.
// Everything is in an unnamed namespace and nothing of the standard library's templates is called, see codes_body.h.
//
// A tile of V::blocks * 16 rows times T tokens stays in registers for a span of columns:
//
//     w   a register of rows for each step        x   4 bytes of a token, in every lane
//     sum [T tokens][registers of a tile]         then sums += sum * scale of the rows * scale of the token
#pragma once

#include <cstring>

#include "panel_gemm_unit.h"

namespace bitpalette {
namespace {

// The registers of a tile's rows in one step.
template <class V>
struct Tile {
    static constexpr int by_block = panel_rows / V::lanes, registers = V::blocks * by_block,
                         rows = V::blocks * panel_rows;

    static const uint8_t* words(const PanelPiece& p, int64_t step, int r) {
        return p.values + r / by_block * p.values_block + step * panel_step_bytes + r % by_block * 4 * V::lanes;
    }
    static typename V::Floats parameters(const float* of, const PanelPiece& p, int64_t span, int r) {
        return V::load(of + r / by_block * p.scale_block + span * panel_rows + r % by_block * V::lanes);
    }
};

// What the 32 bits of a lane are.
struct Bytes {
    static constexpr PanelType type = PanelType::uint8;
};
struct Shorts {
    static constexpr PanelType type = PanelType::int16;
};

// V::chain steps of bytes, whose products are added up in 16 bits first.
template <class V, int T, int R>
inline void add_chain(const PanelPiece& p, int64_t step, const uint8_t* x, typename V::Ints (&sum)[T][R]) {
    typename V::Ints pairs[T][R];
#pragma GCC unroll 8
    for (int c = 0; c < V::chain; ++c) {
        typename V::Ints w[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
            w[r] = V::load_words(Tile<V>::words(p, step + c, r));
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) {
            const typename V::Ints four = V::all_words(x + 4 * (c * T + t));
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const typename V::Ints products = V::byte_pairs(w[r], four);
                pairs[t][r] = c == 0 ? products : V::add_shorts(pairs[t][r], products);
            }
        }
    }
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
            sum[t][r] = V::add_pairs(sum[t][r], pairs[t][r]);
}

template <class V, class Products, int T>
void multiply_integers(const PanelPiece& p) {
    constexpr int R = Tile<V>::registers, step_columns = panel_step_columns(Products::type);
    const uint8_t* x = p.x;
    int64_t step = 0;
    for (int64_t span = 0, column = 0; column < p.columns; ++span, column += p.span) {
        const int64_t left = p.columns - column, end = step + (left < p.span ? left : p.span) / step_columns;
        typename V::Ints sum[T][R];
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r)
                sum[t][r] = V::all_ints(p.start[span * T + t]);
        if constexpr (Products::type == PanelType::uint8 && V::chain > 1)
            for (; step < end; step += V::chain, x += 4 * T * V::chain)
                add_chain<V>(p, step, x, sum);
        else
            for (; step < end; ++step, x += 4 * T) {
                typename V::Ints w[R];
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r)
                    w[r] = V::load_words(Tile<V>::words(p, step, r));
#pragma GCC unroll 16
                for (int t = 0; t < T; ++t) {
                    const typename V::Ints four = V::all_words(x + 4 * t);
#pragma GCC unroll 4
                    for (int r = 0; r < R; ++r)
                        V::add_products(sum[t][r], w[r], four, Products());
                }
            }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const typename V::Floats scale = Tile<V>::parameters(p.scale, p, span, r);
#pragma GCC unroll 16
            for (int t = 0; t < T; ++t) {
                float* to = p.sums + t * Tile<V>::rows + r * V::lanes;
                const typename V::Floats by = V::multiply(scale, V::all(p.x_scale[span * T + t]));
                V::store(to, V::multiply_add(V::to_floats(sum[t][r]), by, V::load(to)));
            }
        }
        if (p.offset != nullptr)
            for (int r = 0; r < R; ++r) {
                const typename V::Floats offset = Tile<V>::parameters(p.offset, p, span, r);
                for (int t = 0; t < T; ++t) {
                    float* to = p.sums + t * Tile<V>::rows + r * V::lanes;
                    V::store(to, V::multiply_add(offset, V::all(p.x_sum[span * T + t]), V::load(to)));
                }
            }
    }
}

template <class V, int T>
void multiply_floats(const PanelPiece& p) {
    constexpr int R = Tile<V>::registers;
    typename V::Floats sum[T][R];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
            sum[t][r] = V::load(p.sums + t * Tile<V>::rows + r * V::lanes);
    const uint8_t* x = p.x;
    for (int64_t step = 0; step < p.columns; ++step, x += 4 * T) {
        typename V::Floats w[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
            w[r] = V::load_float_words(Tile<V>::words(p, step, r));
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) {
            const typename V::Floats value = V::all_float_words(x + 4 * t);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r)
                sum[t][r] = V::multiply_add(w[r], value, sum[t][r]);
        }
    }
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
            V::store(p.sums + t * Tile<V>::rows + r * V::lanes, sum[t][r]);
}

template <class V, class Products, int T = V::most_tokens>
void integers(const PanelPiece& p, int tokens) {
    if constexpr (T > 1) {
        if (tokens < T)
            return integers<V, Products, T - 1>(p, tokens);
    }
    multiply_integers<V, Products, T>(p);
}

template <class V, int T = V::most_tokens>
void floats(const PanelPiece& p, int tokens) {
    if constexpr (T > 1) {
        if (tokens < T)
            return floats<V, T - 1>(p, tokens);
    }
    multiply_floats<V, T>(p);
}

// Column by column, of 4 or 2 in a step, to registers of rows.
template <class V, class Products>
void to_floats(const uint8_t* from, int64_t n, int bias, const float* scale, const float* offset, float* to) {
    constexpr int columns = panel_step_columns(Products::type);
    const typename V::Ints start = V::all_ints(bias);
    for (int part = 0; part < panel_rows; part += V::lanes) {
        const typename V::Floats by = V::load(scale + part);
        const typename V::Floats more = offset == nullptr ? V::all(0) : V::load(offset + part);
        for (int64_t i = 0; i < n; ++i) {
            typename V::Ints words = V::load_words(from + i * panel_step_bytes + 4 * part);
            for (int c = 0; c < columns; ++c) {
                const typename V::Floats value = V::to_floats(V::minus(V::lowest(words, Products()), start));
                V::store(to + (i * columns + c) * panel_rows + part, V::multiply_add(value, by, more));
                words = V::next(words, Products());
            }
        }
    }
}

template <class V>
constexpr PanelUnit panel_of() {
    static_assert(V::blocks <= panel_most_blocks && V::most_tokens <= panel_most_tokens);
    return {V::blocks, V::most_tokens, V::top_byte, integers<V, Bytes>,  integers<V, Shorts>,
            floats<V>, V::interleave,  V::widen,    to_floats<V, Bytes>, to_floats<V, Shorts>};
}

} // namespace
} // namespace bitpalette
