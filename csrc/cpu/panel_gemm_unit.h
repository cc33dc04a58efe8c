// What each instruction set's translation unit of panel_gemm provides, and what it is given.
#pragma once

#include "isa.h"
#include "panel.h"

namespace bitpalette {

constexpr int panel_most_blocks = 2; // of 16 rows, in a tile
constexpr int panel_most_tokens = 12;

// A piece of a tile (some blocks of 16 rows) and of the tokens of one call.
struct PanelPiece {
    int64_t columns;              // a multiple of 32
    int64_t span;                 // the last one may be short
    const uint8_t* values;        // [blocks] panels
    int64_t values_block;         // bytes from block to block
    const float *scale, *offset;  // [blocks][spans, 16]; offset null: none
    int64_t scale_block;          // floats from block to block
    const uint8_t* x;             // [steps, tokens] of 4 bytes: int8, int16 or float32 of a step's columns
    const int32_t* start;         // [spans, tokens]: -bias * sum of a span's integers
    const float *x_scale, *x_sum; // [spans, tokens]: the sum is that of the values
    float* sums;                  // [tokens, blocks * 16], added to
};

using PanelMultiply = void (*)(const PanelPiece& piece, int tokens);

struct PanelUnit {
    int blocks;      // of a tile
    int most_tokens; // of one call
    bool has_bytes;
    PanelMultiply bytes, shorts, floats; // by the type that is multiplied; bytes null where has_bytes is false
    // to[i][r] = rows[r][i] for n words of 32 bits, a multiple of 16
    void (*interleave)(const uint8_t* const (&rows)[panel_rows], int64_t n, uint8_t* to);
    // n steps of uint8 to 2 n of int16
    void (*widen)(const uint8_t* from, int64_t n, uint8_t* to);
};

extern const PanelUnit panel_scalar;
#if BITPALETTE_X86
extern const PanelUnit panel_avx2;
extern const PanelUnit panel_avx512;
#endif

// Null for an instruction set that has none.
const PanelUnit* panel_unit(Isa isa);

} // namespace bitpalette
