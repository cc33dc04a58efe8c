// Codec `int` at 8 bits, symmetric, a scale a row, straight from the canonical layout: y = x W^T.
//
//     codes  uint8 [out, in]   value = (code - 128) * scale[row]
//     scale  fp16  [out]
//
// A lane is four columns of a row. Codes are multiplied as they are, unsigned, and -128 times the sum of four int8 of x
// is what a lane starts from; four rows share each register of the input.
#pragma once

#include <cstdint>

#include "isa.h"
#include "linear.h"

namespace bitpalette {

constexpr int int8_quad_columns = 4;

struct Int8View {
    const uint8_t* codes;
    const uint16_t* scale;
    int64_t out, in;
};

struct Int8Input {
    int64_t tokens, row;  // row: columns from token to token, a multiple of 256
    Int8Blocks blocks;    // integer forms
    const int32_t* start; // [tokens, row / 4], integer forms: what the lanes start from
    const float* scale;   // [tokens, row / 4], integer forms: the input's scale of each lane
    const float* values;  // [tokens, row], f32
};

// One instruction set's translation unit. None of the functions checks its arguments.
struct Int8Unit {
    using Multiply = void (*)(const Int8View& w, const Int8Input& x, float* y, int64_t y_row, int64_t begin,
                              int64_t end);
    void (*expand)(const Int8Input& x, int32_t* start, float* scale);
    Multiply one_plane, two_planes, floats; // as LinearWeight::multiply
    void (*decode)(const Int8View& w, int64_t row, float* to);
};

extern const Int8Unit int8_scalar;
#if BITPALETTE_X86
extern const Int8Unit int8_avx2;
extern const Int8Unit int8_avxvnni;
extern const Int8Unit int8_avx512;
#endif
#if BITPALETTE_AARCH64
extern const Int8Unit int8_neon;
#endif

class Int8Weight : public LinearWeight {
  public:
    // form: int8_by_32, int16_by_256 or f32. std::invalid_argument for another, for sizes below 1, and for an
    // instruction set that this machine lacks.
    Int8Weight(Isa isa, InputForm form, const uint8_t* codes, const uint16_t* scale, int64_t out, int64_t in);

    InputForm form() const override { return form_; }
    int64_t bytes() const override { return out * in; }
    void multiply(const Activations& x, float* y, int64_t y_row, int64_t begin, int64_t end) const override;
    const PanelKind* panel() const override { return panel_.unit == nullptr ? nullptr : &panel_; }
    void unpack(int64_t block, int64_t begin, int64_t end, const PanelBlock& to) const override;
    void decode(const int64_t* index, int64_t begin, int64_t end, float* rows) const override;

  private:
    InputForm form_;
    Int8View view_;
    const Int8Unit& unit_;
    Int8Unit::Multiply multiply_;
    PanelKind panel_;
};

} // namespace bitpalette
