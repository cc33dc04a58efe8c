// What the code-plane kernel of one instruction set is handed, and hands over (codes.h has the layout).
#pragma once

#include <cstdint>

#include "activations.h"
#include "isa.h"
#include "linear.h"

namespace bitpalette {

constexpr int codes_tile_columns = 32;
constexpr int codes_plane_bytes = 64; // a bit of a tile, on average

struct CodesView {
    const uint8_t* codes;
    const uint16_t* scale;      // null: 1
    const uint8_t* zero;        // null: `offset` for all
    float offset;               // the zero point of symmetric codes
    const float* levels;        // the one table in float32 [16]; null: codec int, or a table for each row
    const uint16_t* row_tables; // fp16 [out, entries]; null: codec int, or one table
    const uint8_t* table_bytes;
    const float* table_unit;
    int entries, bits;
    int64_t out, in, tiles, groups, tiles_per_group;
};

// The input in the form that the weight reads.
struct CodesInput {
    int64_t tokens, row;  // row: columns from token to token, a multiple of 256
    Int8Blocks blocks;    // integer forms
    const int32_t* start; // [tokens, tiles], integer forms: minus the sum of a tile's codes, times the offset of bytes
    const float* values;  // [tokens, row], f32
    const float* negative_sum; // [tokens, tiles], f32 with a zero point: minus the sum of a tile's values
};

// For one kind of weight and one form of input. None of them checks its arguments.
struct CodesFunctions {
    void (*integer_starts)(const CodesView& w, const CodesInput& x, int32_t* start);
    void (*float_sums)(const CodesView& w, const CodesInput& x, float* negative_sum);
    // As LinearWeight::multiply.
    void (*multiply)(const CodesView& w, const CodesInput& x, float* y, int64_t y_row, int64_t begin, int64_t end);
    // As LinearWeight::unpack, values uint8.
    void (*unpack)(const CodesView& w, int64_t block, int64_t begin, int64_t end, int span, const PanelBlock& to);
    // One row [in], as the codec decodes it.
    void (*decode)(const CodesView& w, int64_t row, float* to);
};

// multiply is null for a form that there is no kernel for.
using CodesUnit = CodesFunctions (*)(const CodesView& w, InputForm form);

CodesFunctions codes_scalar(const CodesView& w, InputForm form);
#if BITPALETTE_X86
CodesFunctions codes_avx2(const CodesView& w, InputForm form);
CodesFunctions codes_avxvnni(const CodesView& w, InputForm form);
CodesFunctions codes_avx512(const CodesView& w, InputForm form);
#endif
#if BITPALETTE_AARCH64
CodesFunctions codes_neon(const CodesView& w, InputForm form);
#endif

} // namespace bitpalette
