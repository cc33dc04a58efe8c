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
    int top_byte;    // the largest value of a panel that `bytes` multiplies without leaving its range
    PanelMultiply bytes, shorts, floats; // by the type that is multiplied
    // to[i][r] = rows[r][i] for n words of 32 bits, a multiple of 16
    void (*interleave)(const uint8_t* const (&rows)[panel_rows], int64_t n, uint8_t* to);
    // n steps of uint8 to 2 n of int16
    void (*widen)(const uint8_t* from, int64_t n, uint8_t* to);
    // n steps of a span, uint8 or int16, to one of f32 for each column: (value - bias) * scale, + offset where there is
    // one; both [16]
    void (*bytes_to_floats)(const uint8_t* from, int64_t n, int bias, const float* scale, const float* offset,
                            float* to);
    void (*shorts_to_floats)(const uint8_t* from, int64_t n, int bias, const float* scale, const float* offset,
                             float* to);
};

extern const PanelUnit panel_scalar;
#if BITPALETTE_X86
extern const PanelUnit panel_avx2;
extern const PanelUnit panel_avxvnni;
extern const PanelUnit panel_avx512;
#endif

// Null for an instruction set that has none.
const PanelUnit* panel_unit(Isa isa);

} // namespace bitpalette
