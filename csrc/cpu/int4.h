// Codec `int` at 4 bits on a CPU: y = x W^T with x in int8 per 32 columns, and exact decoding of rows.
//
// Packed layout. Tiles of 16 output rows x 32 columns, 256 bytes, row blocks outermost:
//
//     codes  uint8 [blocks, tiles, 4 steps, 16 rows, 4]      blocks = ceil(out / 16), tiles = ceil(in / 32)
//
//     tile:   step 0 (columns 0..7)            step 1 (columns 8..15)    ...
//             row 0    row 1   ...  row 15
//             4 bytes  4 bytes      4 bytes    = 64 bytes, one AVX-512 register; a 32-bit lane is a row
//     byte i of row r in step j:   low nibble = column 8j + i,   high nibble = column 8j + 4 + i
//
// so that (register & 0x0F) and (register >> 4 & 0x0F) meet four consecutive int8 of x, broadcast, in one vpdpbusd.
//
//     scale  fp16  [blocks, groups, 16]
//     zero   uint8 [blocks, groups, 16]      absent when symmetric: the zero point is 8
//
// A group is group_size columns, a multiple of 32 (0: the whole row), so a tile lies in one group; the last group may
// be short. Rows and columns beyond the weight's own have code 0 and scale 0.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace bitpalette {

constexpr int int4_block_rows = 16;
constexpr int int4_tile_columns = 32;
constexpr int int4_tile_bytes = int4_block_rows * int4_tile_columns / 2;

struct Int4Weight {
    const uint8_t* codes;
    const uint16_t* scale; // fp16 bits
    const uint8_t* zero;   // null: symmetric
    int64_t out, in;
    int64_t group_size; // 0: the whole row

    int64_t tiles() const { return (in + int4_tile_columns - 1) / int4_tile_columns; }
    int64_t blocks() const { return (out + int4_block_rows - 1) / int4_block_rows; }
    int64_t groups() const { return group_size == 0 ? 1 : (in + group_size - 1) / group_size; }
    int64_t tiles_per_group() const { return group_size == 0 ? tiles() : group_size / int4_tile_columns; }
};

// x quantized: value = code * scale of its tile. negative_sum = minus the sum of a tile's codes, for zero points.
struct Int8Input {
    int8_t* codes;         // [tokens, tiles * 32], columns beyond `in` are 0
    float* scale;          // [tokens, tiles]
    int32_t* negative_sum; // [tokens, tiles]
};

// One instruction set's translation unit. The body never checks its arguments; the functions below do.
struct Int4Ops {
    // x [tokens, in] of the given type to int8. A tile with NaN or infinity gets scale NaN, which reaches every output.
    void (*quantize)(const Int4Weight& w, const void* x, Dtype dtype, int64_t tokens, const Int8Input& to);
    // y [tokens, out], bias [out] or null, both of the given type; row blocks begin..end-1 only.
    void (*linear)(const Int4Weight& w, const Int8Input& x, int64_t tokens, const void* bias, void* y, Dtype dtype,
                   int64_t begin, int64_t end);
    // rows index[begin..end-1] of W as float32, to out + i * in; (code - zero) * scale in float32, as the codec does.
    void (*rows)(const Int4Weight& w, const int64_t* index, int64_t begin, int64_t end, float* out);
};

extern const Int4Ops int4_scalar;
#if BITPALETTE_X86
extern const Int4Ops int4_avx2;
extern const Int4Ops int4_avx512;
#endif

// Throws std::invalid_argument where the machine lacks the instruction set or the sizes make no sense.
void int4_check(Isa isa, const Int4Weight& w);

// y [tokens, out] = x [tokens, in] W^T + bias on up to `threads` threads. isa and w have passed int4_check.
void int4_linear(Isa isa, const Int4Weight& w, const void* x, const void* bias, void* y, Dtype dtype, int64_t tokens,
                 int threads);

// out [n, in] float32 = rows `index` of W. Throws std::invalid_argument for an index out of range.
void int4_rows(Isa isa, const Int4Weight& w, const int64_t* index, int64_t n, float* out, int threads);

} // namespace bitpalette
