// From the container's codes to operand A of the 16-bit matrix instruction: what the formats have in common.
//
// A superblock is 64 rows (N) x 64 columns (K) of the weight, 4 x 4 tiles of 16 x 16 (docs/gpu.md). Lane 4g + t of a
// warp owns of each tile rows g and g + 8, columns 4t to 4t + 3: registers a0 = row g, the first two columns, a1 = row
// g + 8, the first two, a2 and a3 the last two. A format is a struct with
//
//     Table                             what it keeps in registers for the whole kernel, made by table(...)
//     Zero                              what it subtracts in one group of the lane's two rows, made by zero(...)
//     Words                             the lane's codes of the four tiles of one n16, read by load(...)
//     fragment(words, k16, ..., a)      the values of one tile, exact, not multiplied by the scale
//     factor                            what the values are short of: multiplied into the sums, a power of two
//     superblock_bytes(args)            of codes, from least_bytes to most_bytes
//     grouped                           whether it may have a scale for every group of columns
#pragma once

#include "act16.cuh"
#include "container.cuh"

namespace bitpalette {

constexpr int block_side = superblock;
constexpr int tiles_along = block_side / tile_side;

// What the formats read of a weight beside its codes.
struct FragmentArgs {
    const void* table;     // fp16 [16]: the levels of lut, ascending or not; null for others
    int row_bits;          // m of the trellis
    int window;            // L of the trellis
    uint32_t default_zero; // the zero point of symmetric levels
};

// Codes of 2, 3 and 4 bits as nibbles, eight to a word, one word a tile. With 2 and 3 bits only the low bits of a
// nibble mean something: the others are left as they come.
template <int Bits>
struct NibbleWords;

template <>
struct NibbleWords<4> {
    uint32_t word[4];

    BP_DEVICE static NibbleWords load(const uint8_t* superblock, int n16, int lane) {
        const uint4 w = reinterpret_cast<const uint4*>(superblock)[n16 * 32 + lane];
        return {{w.x, w.y, w.z, w.w}};
    }
    BP_DEVICE uint32_t tile(int k16) const { return word[k16]; }
};

template <>
struct NibbleWords<2> {
    uint32_t word[2];

    BP_DEVICE static NibbleWords load(const uint8_t* superblock, int n16, int lane) {
        const uint2 w = reinterpret_cast<const uint2*>(superblock)[n16 * 32 + lane];
        return {{w.x, w.y}};
    }
    BP_DEVICE uint32_t tile(int k16) const { return word[k16 / 2] >> 2 * (k16 % 2); }
};

template <>
struct NibbleWords<3> {
    uint32_t low[2], high;

    static constexpr int high_plane = 2 * block_side * block_side / 8;

    BP_DEVICE static NibbleWords load(const uint8_t* superblock, int n16, int lane) {
        const uint2 w = reinterpret_cast<const uint2*>(superblock)[n16 * 32 + lane];
        const uint32_t h = reinterpret_cast<const uint32_t*>(superblock + high_plane)[n16 * 32 + lane];
        return {{w.x, w.y}, h};
    }
    BP_DEVICE uint32_t tile(int k16) const {
        const uint32_t top = k16 < 3 ? high << (2 - k16) : high >> 1;
        return blend<0x33333333u>(low[k16 / 2] >> 2 * (k16 % 2), top);
    }
};

// Codes of 8 bits: two words a tile, rows g and g + 8, bytes in the column order 0, 2, 1, 3.
struct ByteWords {
    uint32_t word[8];

    BP_DEVICE static ByteWords load(const uint8_t* superblock, int n16, int lane) {
        const uint4* at = reinterpret_cast<const uint4*>(superblock) + (n16 * 32 + lane) * 2;
        const uint4 p = at[0], q = at[1];
        return {{p.x, p.y, p.z, p.w, q.x, q.y, q.z, q.w}};
    }
};

} // namespace bitpalette
