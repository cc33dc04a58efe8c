// The body of trellis_linear_*.cpp, over the vocabulary `V` of an instruction set: a tile's row is V::parts registers.
// Everything is in an unnamed namespace: a function shared by name between units would be linked once, with one unit's
// instructions.
#pragma once

#include <algorithm>
#include <cstring>

#include "trellis_linear_unit.h"

namespace bitpalette {
namespace {

// The pieces of one row of W, tile by tile.
struct Pieces {
    const uint8_t* first;
    int64_t stride;
};

// Row 15 needs the tile's last m / 8 bytes and the two after them, which are its first two.
Pieces pieces_of(const TrellisWeight& w, const TrellisRow& at, int64_t row, uint8_t* joined) {
    const int64_t tiles = w.tiles(), bytes = w.code.bytes();
    const uint8_t* tile = w.codes + row / trellis_side * tiles * bytes;
    if (row % trellis_side != trellis_side - 1)
        return {tile + at.begin, bytes};
    for (int64_t c = 0; c < tiles; ++c, tile += bytes) {
        std::memcpy(joined + c * trellis_piece, tile + bytes - 14, 14);
        std::memcpy(joined + c * trellis_piece + 14, tile, 2);
    }
    return {joined, trellis_piece};
}

// The 16 levels of a row of a tile, as floats: exact integers.
template <class V>
struct Levels {
    typename V::Ints pick[V::parts], shift[V::parts], mask;

    Levels(const TrellisRow& row, int window) : mask(V::integer((1u << window) - 1)) {
        for (int p = 0; p < V::parts; ++p) {
            pick[p] = V::load_ints(row.pick[p * V::lanes]);
            shift[p] = V::load_ints(row.shift + p * V::lanes);
        }
    }

    typename V::Floats operator()(const uint8_t* piece, int part) const {
        const auto windows = V::shift_right(V::bytes(piece, pick[part]), shift[part]);
        return V::level(V::times(V::both(windows, mask), V::integer(0x83DCD12Du)));
    }
};

// to[t] = the row's levels times x[t], for T tokens.
template <class V, int T>
void dots(const Levels<V>& levels, Pieces pieces, int64_t tiles, const float* x, float* to) {
    // independent sums a token: a multiply-add takes four cycles, as long as decoding a register does
    constexpr int chains = T > V::most_chained ? 1 : 2;
    constexpr int step = V::parts < chains ? chains / V::parts : 1; // tiles at a time
    const int64_t row = tiles * trellis_side;
    typename V::Floats sum[chains][T];
    for (int k = 0; k < chains; ++k)
        for (int t = 0; t < T; ++t)
            sum[k][t] = V::zero();
    const auto add = [&](int64_t c, int s) {
        for (int p = 0; p < V::parts; ++p) {
            const auto level = levels(pieces.first + c * pieces.stride, p);
            const float* at = x + c * trellis_side + p * V::lanes;
            for (int t = 0; t < T; ++t) {
                auto& into = sum[(s * V::parts + p) % chains][t];
                into = V::multiply_add(level, V::load(at + t * row), into);
            }
        }
    };
    int64_t c = 0;
    for (; c + step <= tiles; c += step)
        for (int s = 0; s < step; ++s)
            add(c + s, s);
    for (; c < tiles; ++c)
        add(c, 0);
    for (int t = 0; t < T; ++t)
        to[t] = V::total(chains == 1 ? sum[0][t] : V::add(sum[0][t], sum[chains - 1][t]));
}

template <class V>
using Dots = void (*)(const Levels<V>& levels, Pieces pieces, int64_t tiles, const float* x, float* to);

constexpr int most_tokens = 8;

template <class V>
constexpr Dots<V> dots_of[most_tokens] = {dots<V, 1>, dots<V, 2>, dots<V, 3>, dots<V, 4>,
                                          dots<V, 5>, dots<V, 6>, dots<V, 7>, dots<V, 8>};

template <class V>
void linear(const TrellisWeight& w, const TrellisRows& rows, const float* x, int64_t tokens, float* y, int64_t begin,
            int64_t end, uint8_t* joined) {
    const int64_t tiles = w.tiles(), last = std::min(end * trellis_side, w.out);
    for (int64_t row = begin * trellis_side; row < last; ++row) {
        const TrellisRow& at = rows.row[row % trellis_side];
        const Pieces pieces = pieces_of(w, at, row, joined);
        const Levels<V> levels(at, w.code.window);
        const float scale = w.scale[row] * (1.0f / 128);
        for (int64_t t = 0; t < tokens; t += most_tokens) {
            const int64_t n = std::min<int64_t>(tokens - t, most_tokens);
            float sums[most_tokens];
            dots_of<V>[n - 1](levels, pieces, tiles, x + t * tiles * trellis_side, sums);
            for (int64_t k = 0; k < n; ++k)
                y[(t + k) * w.out + row] = sums[k] * scale;
        }
    }
}

template <class V>
void decode(const TrellisWeight& w, const TrellisRows& rows, const int64_t* index, int64_t begin, int64_t end, float* y,
            uint8_t* joined) {
    const int64_t whole = w.in / trellis_side, rest = w.in % trellis_side;
    for (int64_t i = begin; i < end; ++i) {
        const int64_t row = index == nullptr ? i : index[i];
        const TrellisRow& at = rows.row[row % trellis_side];
        const Pieces pieces = pieces_of(w, at, row, joined);
        const Levels<V> levels(at, w.code.window);
        const auto scale = V::all(w.scale[row] * (1.0f / 128));
        float* to = y + i * w.in;
        const auto tile = [&](int64_t c, float* values) {
            for (int p = 0; p < V::parts; ++p)
                V::store(values + p * V::lanes,
                         V::multiply(levels(pieces.first + c * pieces.stride, p), scale));
        };
        for (int64_t c = 0; c < whole; ++c)
            tile(c, to + c * trellis_side);
        if (rest > 0) {
            float values[trellis_side];
            tile(whole, values);
            std::copy(values, values + rest, to + whole * trellis_side);
        }
    }
}

} // namespace
} // namespace bitpalette
