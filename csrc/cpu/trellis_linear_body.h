// The body of trellis_linear_*.cpp, over the vocabulary `V` of an instruction set: a register is V::rows rows of a
// tile. Everything is in an unnamed namespace: a function shared by name between units would be linked once, with one
// unit's instructions.
//
// The 16 windows of a row share the at most 98 bits from their row's first byte on, so 16 bytes of the tile, given to
// every 128 bits of a register, hold all of them. A byte shuffle brings each 32-bit lane the bytes of two windows; two
// shifts and a blend put them into its halves. For row r = 1 of m = 20:
//
//     bit of the tile   16       24       32       40 ...       column c starts at bit 20 + floor(20 c / 16):
//     byte               2        3        4        5 ...       lane 0: bytes 2 3 4 5, low half >> 4, high half << 11
//                        [.... 16 bytes, loaded once ....       lane 1: bytes 2 3 4 5, low half >> 6, high half << 9
//
// Shuffle and shifts belong to (m, r) and stay in registers for the whole row. Only row 15 reads across the tile's
// cyclic end; its last 14 and first 2 bytes are joined beforehand.
#pragma once

#include <cstring>

#include "trellis_linear_unit.h"

namespace bitpalette {
namespace {

constexpr int64_t cached_bytes = 24 << 10; // codes and inputs that 16 rows read again: of a cache of 32 KiB or more
constexpr int64_t most_tiles = cached_bytes / (2 * trellis_least_bits + trellis_side * 2) / 16 * 16;

// The pieces of one row of W, tile by tile.
struct Pieces {
    const uint8_t* first;
    int64_t stride;
};

// Of tiles first..first+tiles-1. The last row of a tile needs the tile's last m / 8 bytes and its first two after them;
// joined: room for 16 bytes a tile.
Pieces pieces_of(const TrellisWeight& w, const TrellisRowWindows& windows, int64_t row, int64_t first, int64_t tiles,
                 uint8_t* joined) {
    const int64_t bytes = w.code.bytes(), r = row % trellis_side;
    const uint8_t* tile = w.codes + (row / trellis_side * w.tiles() + first) * bytes;
    if (r != trellis_side - 1)
        return {tile + windows.begin[r], bytes};
    constexpr int head = 2, tail = trellis_piece - head;
    for (int64_t c = 0; c < tiles; ++c, tile += bytes) {
        std::memcpy(joined + c * trellis_piece, tile + bytes - tail, tail);
        std::memcpy(joined + c * trellis_piece + tail, tile, head);
    }
    return {joined, trellis_piece};
}

// Halves of state * 0x83DCD12D, 16 bits a lane.
template <class V>
struct Products {
    typename V::Ints low, high;
};

// How a row, or V::rows of them, becomes products.
template <class V, bool masked>
struct Decoder {
    typename V::Ints pick, right, left, mask, low_factor, high_factor;

    Decoder(typename V::Ints pick, typename V::Ints right, typename V::Ints left, int window)
        : pick(pick), right(right), left(left), mask(V::shorts(static_cast<uint16_t>((1 << window) - 1))),
          low_factor(V::shorts(0xD12D)), high_factor(V::shorts(0x83DC)) {}

    Products<V> operator()(const uint8_t* const* pieces) const {
        const auto four = V::bytes(pieces, pick);
        auto state = V::odd_halves(V::shift_right(four, right), V::shift_left(four, left));
        if (masked)
            state = V::both(state, mask);
        return {V::times(state, low_factor),
                V::add_shorts(V::times_high(state, low_factor), V::times(state, high_factor))};
    }
};

template <class V>
typename V::Ints levels(const Products<V>& p) {
    return V::add_shorts(V::byte_pairs(p.low), V::byte_pairs(p.high));
}

// T sums += products of V::rows rows of a tile.
template <class V, int T, bool masked, bool twice>
inline __attribute__((always_inline)) void
add_tile(const Decoder<V, masked>& decoder, const uint8_t* (&piece)[V::rows], const Pieces* rows, const int16_t* values,
         const int8_t* pairs, int64_t row, typename V::Ints (&sum)[T], typename V::Ints (&more)[T]) {
    const Products<V> p = decoder(piece);
    for (int i = 0; i < V::rows; ++i)
        piece[i] += rows[i].stride;
    if constexpr (twice) {
        for (int t = 0; t < T; ++t) {
            const auto a = V::load_row(pairs + t * row * 2);
            sum[t] = V::add_byte_products(sum[t], p.low, a);
            more[t] = V::add_byte_products(more[t], p.high, a);
        }
    } else {
        const auto level = levels<V>(p);
        for (int t = 0; t < T; ++t)
            sum[t] = V::add_products(sum[t], level, V::load_row(values + t * row));
    }
}

// sums [T, V::lanes] += products of V::rows rows, with tiles a multiple of 16 but in the weight's last call.
template <class V, int T, bool masked, bool twice>
void add_products(const Decoder<V, masked>& decoder, const Pieces* rows, int64_t tiles, const TrellisVectors& x,
                  int64_t block, float* sums) {
    const uint8_t* piece[V::rows];
    for (int i = 0; i < V::rows; ++i)
        piece[i] = rows[i].first;
    for (; tiles > 0; tiles -= trellis_block_tiles, ++block) {
        typename V::Ints sum[T], more[T]; // bytes go to two sums: an addition waits five cycles for the last
        const int16_t* values = x.values + block * trellis_block;
        const int8_t* pairs = twice ? x.twice + block * trellis_block * 2 : nullptr;
        for (int t = 0; t < T; ++t) {
            sum[t] = V::load_pairs(x.offset + (t * x.blocks + block) * trellis_pairs);
            if constexpr (twice)
                more[t] = V::zero();
        }
        const auto add = [&](int c) {
            add_tile<V, T, masked, twice>(decoder, piece, rows, values + c * trellis_side,
                                          twice ? pairs + c * trellis_side * 2 : nullptr, x.row, sum, more);
        };
        if (tiles >= trellis_block_tiles) {
#pragma GCC unroll 4 // a sixth less time: an iteration is a dozen instructions
            for (int c = 0; c < trellis_block_tiles; ++c)
                add(c);
        } else {
            for (int c = 0; c < tiles; ++c)
                add(c);
        }
        for (int t = 0; t < T; ++t) {
            if constexpr (twice)
                sum[t] = V::add(sum[t], more[t]);
            float* to = sums + t * V::lanes;
            V::store(to, V::multiply_add(V::to_floats(sum[t]), V::all(x.scale[t * x.blocks + block]), V::load(to)));
        }
    }
}

// A row of tiles for T vectors. Columns are taken in blocks that stay in the first-level cache for 16 rows.
template <class V, int T, bool masked, bool twice>
void multiply_tiles(const TrellisWeight& w, const TrellisVectors& x, int64_t tile_row, float* out) {
    const TrellisRowWindows& windows = trellis_row_windows(w.code);
    constexpr int groups = trellis_side / V::rows;
    alignas(64) float sums[groups][T * V::lanes] = {};
    uint8_t joined[most_tiles * trellis_piece];
    const int64_t some = cached_bytes / (w.code.bytes() + 2 * trellis_side * T) / 16 * 16;
    for (int64_t first = 0; first < w.tiles(); first += some) {
        const int64_t tiles = some < w.tiles() - first ? some : w.tiles() - first;
        const int64_t part = tiles * w.code.bytes() / groups;
        const uint8_t* next = w.codes + (tile_row * w.tiles() + first + tiles) * w.code.bytes();
        for (int g = 0; g < groups; ++g) {
            // what comes after these columns, a part with each group of rows: a third to a half more weights a second
            // from memory; past the end of the weight it is harmless
            for (int64_t at = g * part; at < (g + 1) * part; at += 64)
                __builtin_prefetch(next + at, 0, 2);
            const int r = g * V::rows;
            Pieces rows[V::rows];
            for (int i = 0; i < V::rows; ++i)
                rows[i] = pieces_of(w, windows, tile_row * trellis_side + r + i, first, tiles, joined);
            const Decoder<V, masked> decoder(V::load_aligned(windows.pick[r]), V::load_aligned(windows.right[r]),
                                             V::load_aligned(windows.left[r]), w.code.window);
            add_products<V, T, masked, twice>(decoder, rows, tiles, x, first / trellis_block_tiles, sums[g]);
        }
    }
    for (int g = 0; g < groups; ++g)
        for (int t = 0; t < T; ++t)
            V::row_totals(V::load(sums[g] + t * V::lanes), out + t * trellis_side + g * V::rows);
}

// Masking is one instruction of a dozen or more from three vectors on: not worth a second copy of the code.
template <class V, int T>
void multiply_vectors(const TrellisWeight& w, const TrellisVectors& x, int64_t tile_row, float* sums) {
    if constexpr (T > 2) {
        multiply_tiles<V, T, true, false>(w, x, tile_row, sums);
    } else {
        const bool masked = w.code.window < 16;
        if constexpr (V::byte_products)
            if (x.twice != nullptr)
                return masked ? multiply_tiles<V, T, true, true>(w, x, tile_row, sums)
                              : multiply_tiles<V, T, false, true>(w, x, tile_row, sums);
        masked ? multiply_tiles<V, T, true, false>(w, x, tile_row, sums)
               : multiply_tiles<V, T, false, false>(w, x, tile_row, sums);
    }
}

template <class V>
void multiply(const TrellisWeight& w, const TrellisVectors& x, int64_t tile_row, float* sums) {
    constexpr TrellisMultiply of[trellis_most_vectors] = {
        multiply_vectors<V, 1>, multiply_vectors<V, 2>, multiply_vectors<V, 3>, multiply_vectors<V, 4>,
        multiply_vectors<V, 5>, multiply_vectors<V, 6>, multiply_vectors<V, 7>, multiply_vectors<V, 8>};
    of[x.n - 1](w, x, tile_row, sums);
}

// Levels by rows first, some tiles of all 16 rows.
template <class V>
void unpack(const TrellisWeight& w, int64_t tile_row, int64_t first, int64_t tiles, const PanelUnit& panel,
            uint8_t* to) {
    constexpr int64_t some = 16; // tiles at a time, of which the last may be one that is not there
    constexpr int row_bytes = 2 * trellis_side;
    const TrellisRowWindows& windows = trellis_row_windows(w.code);
    uint8_t joined[some * trellis_piece];
    alignas(64) uint8_t levels_of[trellis_side][some * row_bytes] = {};
    const uint8_t* rows[trellis_side];
    for (int r = 0; r < trellis_side; ++r)
        rows[r] = levels_of[r];
    for (int64_t done = 0; done < tiles; done += some) {
        const int64_t n = some < tiles - done ? some : tiles - done, even = (n + 1) / 2 * 2;
        for (int r = 0; r < trellis_side; r += V::rows) {
            Pieces pieces[V::rows];
            const uint8_t* piece[V::rows];
            for (int i = 0; i < V::rows; ++i) {
                pieces[i] = pieces_of(w, windows, tile_row * trellis_side + r + i, first + done, n, joined);
                piece[i] = pieces[i].first;
            }
            const Decoder<V, true> decoder(V::load_aligned(windows.pick[r]), V::load_aligned(windows.right[r]),
                                           V::load_aligned(windows.left[r]), w.code.window);
            for (int64_t c = 0; c < n; ++c) {
                const typename V::Ints level = levels<V>(decoder(piece));
                static_assert(sizeof level == V::rows * row_bytes);
                for (int i = 0; i < V::rows; ++i) {
                    std::memcpy(levels_of[r + i] + c * row_bytes,
                                reinterpret_cast<const uint8_t*>(&level) + i * row_bytes, row_bytes);
                    piece[i] += pieces[i].stride;
                }
            }
        }
        panel.interleave(rows, even * trellis_pairs, to + done * trellis_pairs * panel_step_bytes);
    }
}

// V::rows tiles of one row at a time.
template <class V>
void decode(const TrellisWeight& w, const int64_t* index, int64_t begin, int64_t end, float* y) {
    const TrellisRowWindows& windows = trellis_row_windows(w.code);
    uint8_t joined[most_tiles * trellis_piece];
    for (int64_t i = begin; i < end; ++i) {
        const int64_t row = index == nullptr ? i : index[i], r = row % trellis_side;
        const Decoder<V, true> decoder(V::load_row(windows.pick[r]), V::load_row(windows.right[r]),
                                       V::load_row(windows.left[r]), w.code.window);
        const float scale = w.scale[row] * (1.0f / 128);
        for (int64_t first = 0; first < w.tiles(); first += most_tiles) {
            const int64_t tiles = most_tiles < w.tiles() - first ? most_tiles : w.tiles() - first;
            const Pieces pieces = pieces_of(w, windows, row, first, tiles, joined);
            for (int64_t c = 0; c < tiles; c += V::rows) {
                const uint8_t* piece[V::rows];
                for (int k = 0; k < V::rows; ++k) // the last tile again where their number is odd
                    piece[k] = pieces.first + (c + k < tiles ? c + k : tiles - 1) * pieces.stride;
                const auto level = levels<V>(decoder(piece));
                const int64_t column = (first + c) * trellis_side, left = w.in - column;
                float* to = y + i * w.in + column;
                constexpr int values = V::rows * trellis_side;
                if (left >= values) {
                    V::store_weights(level, scale, to);
                } else {
                    float rest[values];
                    V::store_weights(level, scale, rest);
                    std::memcpy(to, rest, static_cast<size_t>(left) * sizeof(float));
                }
            }
        }
    }
}

} // namespace
} // namespace bitpalette
