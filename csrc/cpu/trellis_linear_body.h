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

// Of tiles first..first+tiles-1. The last row of a tile needs the tile's last m / 8 bytes and its first two after them.
Pieces pieces_of(const TrellisWeight& w, const TrellisRowWindows& at, int64_t row, int64_t first, int64_t tiles,
                 uint8_t* joined) {
    const int64_t bytes = w.code.bytes();
    const uint8_t* tile = w.codes + (row / trellis_side * w.tiles() + first) * bytes;
    if (row % trellis_side != trellis_side - 1)
        return {tile + at.begin, bytes};
    constexpr int head = 2, tail = trellis_piece - head;
    for (int64_t c = 0; c < tiles; ++c, tile += bytes) {
        std::memcpy(joined + c * trellis_piece, tile + bytes - tail, tail);
        std::memcpy(joined + c * trellis_piece + tail, tile, head);
    }
    return {joined, trellis_piece};
}

// The 16 levels of a row of a tile, as floats: exact integers.
template <class V>
struct Levels {
    typename V::Ints pick[V::parts], shift[V::parts], mask;

    Levels(const TrellisRowWindows& row, int window) : mask(V::integer((1u << window) - 1)) {
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

// sums [T, V::lanes] += the levels of a row in `tiles` tiles, times x [T, ...] with `x_row` floats a token.
template <class V, int T>
void add_products(const Levels<V>& levels, Pieces pieces, int64_t tiles, const float* x, int64_t x_row, float* sums) {
    // independent sums a token: a multiply-add takes four cycles, as many as decoding a register for the next one
    constexpr int chains = T > V::most_chained ? 1 : 2;
    constexpr int step = V::parts < chains ? chains / V::parts : 1; // tiles at a time
    typename V::Floats sum[chains][T];
    for (int k = 0; k < chains; ++k)
        for (int t = 0; t < T; ++t)
            sum[k][t] = k == 0 ? V::load(sums + t * V::lanes) : V::zero();
    const auto add = [&](int64_t c, int s) {
        for (int p = 0; p < V::parts; ++p) {
            const auto level = levels(pieces.first + c * pieces.stride, p);
            const float* at = x + c * trellis_side + p * V::lanes;
            for (int t = 0; t < T; ++t) {
                auto& into = sum[(s * V::parts + p) % chains][t];
                into = V::multiply_add(level, V::load(at + t * x_row), into);
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
        V::store(sums + t * V::lanes, chains == 1 ? sum[0][t] : V::add(sum[0][t], sum[chains - 1][t]));
}

constexpr int64_t cached_tiles = 256; // over all tokens: 16 KiB of x, of a first-level cache of 32 or more

// T tokens of x [T, x_row] to y [T, out], outputs of one row of tiles. Columns are taken in blocks whose x stays in the
// first-level cache for 16 rows.
template <class V, int T>
void linear_tiles(const TrellisWeight& w, const TrellisTileWindows& windows, const float* x, int64_t x_row, float* y,
                  int64_t tile_row, uint8_t* joined) {
    constexpr int64_t block = cached_tiles / T;
    const int64_t tiles = w.tiles(), row = tile_row * trellis_side;
    const int n = static_cast<int>(std::min<int64_t>(trellis_side, w.out - row));
    alignas(64) float sums[trellis_side][T * V::lanes] = {};
    for (int64_t first = 0; first < tiles; first += block) {
        const int64_t some = std::min(block, tiles - first);
        for (int r = 0; r < n; ++r) {
            const Pieces pieces = pieces_of(w, windows.row[r], row + r, first, some, joined);
            const Levels<V> levels(windows.row[r], w.code.window);
            add_products<V, T>(levels, pieces, some, x + first * trellis_side, x_row, sums[r]);
        }
    }
    for (int r = 0; r < n; ++r)
        for (int t = 0; t < T; ++t)
            y[t * w.out + row + r] = V::total(V::load(sums[r] + t * V::lanes)) * (w.scale[row + r] * (1.0f / 128));
}

template <class V>
using LinearTiles = void (*)(const TrellisWeight& w, const TrellisTileWindows& windows, const float* x, int64_t x_row,
                             float* y, int64_t tile_row, uint8_t* joined);

constexpr int64_t most_tokens = 8; // more accumulators than that leave no registers to decode in

template <class V>
constexpr LinearTiles<V> linear_tiles_of[most_tokens] = {linear_tiles<V, 1>, linear_tiles<V, 2>, linear_tiles<V, 3>,
                                                         linear_tiles<V, 4>, linear_tiles<V, 5>, linear_tiles<V, 6>,
                                                         linear_tiles<V, 7>, linear_tiles<V, 8>};

template <class V>
void linear(const TrellisWeight& w, const TrellisTileWindows& windows, const float* x, int64_t x_row, int64_t tokens,
            float* y, int64_t begin, int64_t end, uint8_t* joined) {
    for (int64_t tile_row = begin; tile_row < end; ++tile_row)
        for (int64_t t = 0; t < tokens; t += most_tokens) {
            const LinearTiles<V> tiles = linear_tiles_of<V>[std::min(tokens - t, most_tokens) - 1];
            tiles(w, windows, x + t * x_row, x_row, y + t * w.out, tile_row, joined);
        }
}

template <class V>
void decode(const TrellisWeight& w, const TrellisTileWindows& windows, const int64_t* index, int64_t begin, int64_t end,
            float* y, uint8_t* joined) {
    const int64_t whole = w.in / trellis_side, rest = w.in % trellis_side;
    for (int64_t i = begin; i < end; ++i) {
        const int64_t row = index == nullptr ? i : index[i];
        const TrellisRowWindows& at = windows.row[row % trellis_side];
        const Pieces pieces = pieces_of(w, at, row, 0, w.tiles(), joined);
        const Levels<V> levels(at, w.code.window);
        const auto scale = V::all(w.scale[row] * (1.0f / 128));
        float* to = y + i * w.in;
        const auto tile = [&](int64_t c, float* values) {
            for (int p = 0; p < V::parts; ++p)
                V::store(values + p * V::lanes, V::multiply(levels(pieces.first + c * pieces.stride, p), scale));
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
