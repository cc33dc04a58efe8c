// The packed weight of every GPU kernel (kernels/tiles.py makes it) read one weight at a time.
//
// A matrix [N, K] is padded to multiples of 64 and cut into superblocks of 64 x 64, [NP/64][KP/64] with those of a row
// of superblocks one after another; each is 4 x 4 tiles of 16 x 16, n16 down and k16 across. Lane 4 g + t of a warp has
// of each tile rows g and g + 8, columns 4 t to 4 t + 3. Codes of b bits fill 512 b bytes; with slots 0 to 7 standing
// for (g, c0), (g + 8, c0), (g, c2), (g + 8, c2), (g, c1), (g + 8, c1), (g, c3), (g + 8, c3):
//
//     4 bits       word [n16][lane][k16]       slot s at bit 4 s
//     2 bits       word [n16][lane][k16 / 2]   slot s at bit 4 s + 2 (k16 % 2)
//     3 bits       the low two bits as above, then word [n16][lane]: bit 4 s + k16 is the high one
//     8 bits       word [n16][lane][k16][row / 8], bytes c0, c2, c1, c3
//     lut          as 2, 3 and 4 bits with the slots in pairs of columns: (g, c0), (g, c1), (g + 8, c0), (g + 8, c1),
//                  (g, c2), (g, c3), (g + 8, c2), (g + 8, c3)
//     trellis      [n16][k16], each tile (m + 1) / 2 words: its 2 m canonical bytes, for odd m the first two once more
//
// These functions are the layouts' plain definition, for kernels that have the time (`dequantize`, `embedding`) and as
// a check on the decoders of the GEMMs, which share no code with them.
#pragma once

#include <cstdint>

#include "../cpu/dtype.h"
#include "ptx.cuh"

namespace bitpalette {

constexpr int superblock = 64; // rows, and columns
constexpr int tile_side = 16;
constexpr uint32_t trellis_multiplier = 0x83DCD12Du; // quant/trellis.py
constexpr int trellis_centre = 510;
constexpr float trellis_unit = 1.0f / 128;

enum class Format : int {
    int2,        // (code - zero) * scale, zero 2^(bits-1) or from zero_point
    int3,        //
    int4,        //
    int8,        //
    progressive, // 4 bits: (code * group_scale + group_offset - 128) * scale of the row
    lut2,        // table[code] * scale
    lut3,        //
    lut4,        //
    e4m3,        // code * scale
    trellis,     // level * scale / 128
};

// Addresses of device memory, rows NP = n rounded up to 64 long where they are [groups][NP].
struct Container {
    Format format;
    const uint32_t* codes;
    const uint16_t* scale;       // fp16 [groups][NP]; progressive, trellis: [1][NP]
    const uint8_t* zero_point;   // int: [groups][NP], or null
    const uint16_t* table;       // lut: fp16 [16]
    const uint8_t* group_scale;  // progressive: [groups][NP]
    const uint8_t* group_offset; // progressive: [groups][NP]
    int64_t n, k;
    int group_size; // columns; 0: all
    int row_bits;   // trellis: bits of 16 weights, 16 to 80
    int window;     // trellis: 12, 14 or 16
};

// Words of a superblock's codes.
BP_HOST_DEVICE constexpr int superblock_words(Format format, int row_bits) {
    switch (format) {
    case Format::int2:
    case Format::lut2:
        return 256;
    case Format::int3:
    case Format::lut3:
        return 384;
    case Format::int8:
    case Format::e4m3:
        return 1024;
    case Format::trellis:
        return 16 * ((row_bits + 1) / 2);
    default:
        return 512;
    }
}

// Where a weight is in its superblock: in which tile, in which lane, and which of the lane's rows and columns.
struct Place {
    int n16, k16, lane, half, j;

    BP_DEVICE int slot() const { return half + 2 * (j / 2) + 4 * (j % 2); } // columns 0, 2, 1, 3, each with both rows
    BP_DEVICE int pair_slot() const { return j % 2 + 2 * half + 4 * (j / 2); } // of lut: pairs of columns
};

BP_DEVICE uint32_t code2(const uint32_t* words, const Place& p, int slot) {
    return words[(p.n16 * 32 + p.lane) * 2 + p.k16 / 2] >> (4 * slot + p.k16 % 2 * 2) & 3;
}

BP_DEVICE uint32_t code3(const uint32_t* words, const Place& p, int slot) {
    const uint32_t high = words[256 + p.n16 * 32 + p.lane] >> (4 * slot + p.k16) & 1;
    return code2(words, p, slot) | high << 2;
}

BP_DEVICE uint32_t code4(const uint32_t* words, const Place& p) {
    return words[(p.n16 * 32 + p.lane) * 4 + p.k16] >> (4 * p.slot()) & 15;
}

BP_DEVICE uint32_t code_pairs4(const uint32_t* words, const Place& p) {
    return words[(p.n16 * 32 + p.lane) * 4 + p.k16] >> (4 * p.pair_slot()) & 15;
}

BP_DEVICE uint32_t code8(const uint32_t* words, const Place& p) {
    return words[(p.n16 * 32 + p.lane) * 8 + p.k16 * 2 + p.half] >> (p.slot() / 2 * 8) & 255;
}

// The state of a trellis weight: the low `window` bits of 16 at bit row * m + floor(column * m / 16) of the tile.
BP_DEVICE uint32_t trellis_state(const uint32_t* words, const Place& p, int row_bits, int window) {
    const int tile_words = (row_bits + 1) / 2;
    const uint32_t* tile = words + (p.n16 * 4 + p.k16) * tile_words;
    const int column = p.lane % 4 * 4;
    const int start = (p.half * 8 + p.lane / 4) * row_bits + column * row_bits / tile_side;
    const int word = start / 32;
    // the windows of the lane's four columns; that of the last begins 15 bits behind that of the first at most
    const uint32_t bits = ptx::funnel_right(tile[word], tile[word + 1 == tile_words ? 0 : word + 1], start % 32);
    const int behind = (column + p.j) * row_bits / tile_side - column * row_bits / tile_side;
    return bits >> behind & ((1u << window) - 1);
}

BP_DEVICE int trellis_level(uint32_t state) {
    const uint32_t product = state * trellis_multiplier;
    return static_cast<int>((product & 255) + (product >> 8 & 255) + (product >> 16 & 255) + (product >> 24)) -
           trellis_centre;
}

// Bits of e4m3 (1, 4, 3; bias 7; no infinities, all ones is NaN) moved to the places of fp16, whose bias is 15.
BP_DEVICE float e4m3_to_float(uint32_t code) {
    if ((code & 127) == 127)
        return ptx::uint_as_float(0x7fffffffu);
    return ptx::f16_to_float(static_cast<uint16_t>((code & 128) << 8 | (code & 127) << 7)) * 256.0f;
}

// What weights of one row and one group of columns share.
struct Parameters {
    float scale;
    int zero; // of int; progressive: 128 - group_offset
    int step; // progressive: group_scale
};

template <Format F>
BP_DEVICE Parameters parameters_at(const Container& w, int n, int group) {
    const int64_t rows = (w.n + superblock - 1) / superblock * superblock;
    const int64_t at = group * rows + n;
    if constexpr (F == Format::trellis)
        return {ptx::f16_to_float(w.scale[n]) * trellis_unit, 0, 0};
    else if constexpr (F == Format::progressive)
        return {ptx::f16_to_float(w.scale[n]), 128 - w.group_offset[at], w.group_scale[at]};
    else if constexpr (F == Format::int2 || F == Format::int3 || F == Format::int4 || F == Format::int8) {
        constexpr int middle = F == Format::int2 ? 2 : F == Format::int3 ? 4 : F == Format::int4 ? 8 : 128;
        return {ptx::f16_to_float(w.scale[at]), w.zero_point == nullptr ? middle : w.zero_point[at], 0};
    } else
        return {ptx::f16_to_float(w.scale[at]), 0, 0};
}

// The group of column k, which those up to the next multiple of 32 are in too.
BP_DEVICE int group_of(const Container& w, int k) {
    return w.group_size == 0 ? 0 : k / w.group_size;
}

// One weight as the codec decodes it; the products are exact in fp32. words: of its superblock.
template <Format F>
BP_DEVICE float weight_at(const Container& w, const uint32_t* words, const Place& p, const Parameters& a) {
    if constexpr (F == Format::trellis)
        return ptx::int_to_float(trellis_level(trellis_state(words, p, w.row_bits, w.window))) * a.scale;
    else if constexpr (F == Format::progressive)
        return ptx::int_to_float(static_cast<int>(code4(words, p)) * a.step - a.zero) * a.scale;
    else if constexpr (F == Format::lut2)
        return ptx::f16_to_float(w.table[code2(words, p, p.pair_slot())]) * a.scale;
    else if constexpr (F == Format::lut3)
        return ptx::f16_to_float(w.table[code3(words, p, p.pair_slot())]) * a.scale;
    else if constexpr (F == Format::lut4)
        return ptx::f16_to_float(w.table[code_pairs4(words, p)]) * a.scale;
    else if constexpr (F == Format::e4m3)
        return e4m3_to_float(code8(words, p)) * a.scale;
    else {
        const uint32_t code = F == Format::int2   ? code2(words, p, p.slot())
                              : F == Format::int3 ? code3(words, p, p.slot())
                              : F == Format::int4 ? code4(words, p)
                                                  : code8(words, p);
        return ptx::int_to_float(static_cast<int>(code) - a.zero) * a.scale;
    }
}

// The codes of the superblock of row n and column k.
template <Format F>
BP_DEVICE const uint32_t* superblock_at(const Container& w, int n, int k) {
    const int64_t across = (w.k + superblock - 1) / superblock;
    return w.codes + (n / superblock * across + k / superblock) * superblock_words(F, w.row_bits);
}

} // namespace bitpalette
