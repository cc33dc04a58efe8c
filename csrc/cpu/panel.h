// How a weight is laid out for multiplication with many tokens: unpacked a piece at a time, each piece multiplied with
// all tokens while it is in the first-level cache (panel_gemm.h).
#pragma once

#include <cstdint>

#include "activations.h"

namespace bitpalette {

struct PanelUnit;

// Values of a panel. A step is 64 bytes: a 32-bit lane for each of 16 rows, with as many consecutive columns as fit.
//
//     uint8   [columns / 4, 16 rows, 4]
//     int16   [columns / 2, 16 rows, 2]
//     f32     [columns, 16 rows]
enum class PanelType { uint8, int16, f32 };

constexpr int panel_rows = 16;
constexpr int panel_step_bytes = 64;
constexpr int panel_columns = 32; // pieces are whole multiples of as many columns

constexpr int panel_step_columns(PanelType type) {
    return type == PanelType::uint8 ? 4 : type == PanelType::int16 ? 2 : 1;
}

// What a weight unpacks to: W = (value - bias) * scale + offset; for type f32, for which rows are decoded, the value.
struct PanelKind {
    const PanelUnit* unit; // of an instruction set; null: the weight has no panel
    PanelType unpacked;    // multiplied as it is, or widened first to what the unit can and the input needs
    InputForm form;        // of the input
    int span;              // columns that share scale and offset in the panel and a scale in the input, of 32
    int bias, top;         // of the integers; top: the largest
    bool has_offset;       // where false `unpack` leaves offsets alone
    int64_t fewest_tokens; // from which on it is faster than LinearWeight::multiply

    bool same_input(const PanelKind& other) const {
        return unit == other.unit && unpacked == other.unpacked && form == other.form && span == other.span &&
               bias == other.bias && top == other.top;
    }
};

// 16 rows and some columns of a weight, to be written. Beyond the weight's last row scale and offset are 0; beyond its
// last column, where inputs are zero, integers may be anything.
struct PanelBlock {
    uint8_t* values; // on a cache line
    float* scale;    // [spans, 16]
    float* offset;   // [spans, 16]
};

} // namespace bitpalette
