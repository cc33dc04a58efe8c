// What the codes of a weight stand for: their own numbers, one table, or a table for each row; over a vocabulary V.
// Everything is in an unnamed namespace, since units with different instruction sets include it.
#pragma once

#include "codes_planes.h"

namespace bitpalette {
namespace {

constexpr int lanes = linear_block_rows;

// Levels of the rows of a block, once `load` has read what the weight keeps of them: `quad` gives the bytes that meet
// int8 inputs, none above `top`, `factor` what the sums are multiplied by in the end; `level` gives column i of a
// quad's codes in float32.

template <class V, int bits>
struct Uniform {
    static constexpr int tile_bytes = Planes<V, bits>::bytes;
    // The zero point of 1 bit may be 1/2: twice the code keeps sums whole.
    static constexpr int doubled = bits == 1;
    static constexpr int top = ((1 << bits) - 1) << doubled;
    static constexpr bool has_factor = doubled;

    void load(const CodesView&, int64_t) {}
    template <int k>
    BITPALETTE_INLINE typename V::Codes quad(const uint8_t* tile) const {
        return Planes<V, bits, doubled>::template quad<k>(tile);
    }
    BITPALETTE_INLINE typename V::Floats factor() const { return V::all(0.5f); }

    template <int k>
    BITPALETTE_INLINE typename V::Codes codes(const uint8_t* tile) const {
        return Planes<V, bits>::template quad<k>(tile);
    }
    template <int i>
    BITPALETTE_INLINE typename V::Floats level(typename V::Codes codes) const {
        return V::template number<i, top>(codes);
    }
};

// One table.
template <class V, int bits>
struct Shared {
    static constexpr int tile_bytes = Planes<V, bits>::bytes;
    static constexpr int top = 127 + V::table_offset;
    static constexpr bool has_factor = true;

    void load(const CodesView& w, int64_t) {
        bytes = V::table_bytes(V::load_sixteen(w.table_bytes));
        floats = V::load_table(w.levels);
        unit = V::all(*w.table_unit);
    }
    template <int k>
    BITPALETTE_INLINE typename V::Codes quad(const uint8_t* tile) const {
        return V::shuffle(bytes, Planes<V, bits>::template quad<k>(tile));
    }
    BITPALETTE_INLINE typename V::Floats factor() const { return unit; }

    template <int k>
    BITPALETTE_INLINE typename V::Codes codes(const uint8_t* tile) const {
        return Planes<V, bits>::template quad<k>(tile);
    }
    template <int i>
    BITPALETTE_INLINE typename V::Floats level(typename V::Codes codes) const {
        return V::template look_up<i>(floats, codes);
    }

    typename V::Codes bytes;
    typename V::Table floats;
    typename V::Floats unit;
};

// A table for each row: 16 bytes of a shuffle are four entries of four rows, so the low two bits of a code look up in
// every fourth of the table, and the others choose.
template <class V, int bits>
struct ByRow {
    static constexpr int tile_bytes = Planes<V, bits>::bytes;
    static constexpr int top = 127 + V::table_offset;
    static constexpr bool has_factor = true;
    static constexpr int fourths = 1 << (bits - 2);

    void load(const CodesView& w, int64_t block) {
        unit = V::load(w.table_unit + block * lanes);
        alignas(64) uint8_t first[codes_plane_bytes];
        for (int i = 0; i < codes_plane_bytes; ++i)
            first[i] = static_cast<uint8_t>(i & 12);
        row = V::load_codes(first);
        const int stored = (w.entries + 3) / 4; // 5 to 8 entries have two fourths, 9 to 12 three
        for (int f = 0; f < fourths; ++f)
            bytes[f] = V::table_bytes(
                V::load_codes(w.table_bytes + (block * stored + (f < stored ? f : 0)) * codes_plane_bytes));
    }
    template <int k>
    BITPALETTE_INLINE typename V::Codes quad(const uint8_t* tile) const {
        const typename V::Codes code = Planes<V, bits>::template quad<k>(tile), at = V::merged(row, code, 3);
        if constexpr (bits == 2)
            return V::shuffle(bytes[0], at);
        const typename V::Codes low =
            V::template choose<2>(code, V::shuffle(bytes[0], at), V::shuffle(bytes[fourths > 1], at));
        if constexpr (bits == 4)
            return V::template choose<3>(
                code, low,
                V::template choose<2>(code, V::shuffle(bytes[fourths - 2], at), V::shuffle(bytes[fourths - 1], at)));
        return low;
    }
    BITPALETTE_INLINE typename V::Floats factor() const { return unit; }

    typename V::Codes bytes[fourths], row;
    typename V::Floats unit;
};

} // namespace
} // namespace bitpalette
