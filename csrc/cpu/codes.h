// Codes of 1 to 8 bits on a CPU, for codecs `int` and `lut`: y = x W^T with W [out, in] in code planes.
//
// Tiles of 16 output rows x 32 columns, row blocks outermost. A tile is 8 quads, of 16 rows x 4 columns: a byte a code
// they would fill one AVX-512 register each, in which a 32-bit lane is a row and meets four consecutive int8 of x,
// broadcast, in one vpdpbusd. Codes are cut into planes of 4, 2 and 1 bits, as many as the binary digits of `bits` say
// (3 = 2 + 1, 7 = 4 + 2 + 1), low bits in the wider plane; 8 bits are bytes. So `bits` registers hold a tile:
//
//     codes  uint8 [blocks, tiles, bits, 16 rows, 4]          blocks = ceil(out / 16), tiles = ceil(in / 32)
//
//     registers of a tile      byte i of row r
//     4-bit plane   4          register j:  [quad 2j+1 | quad 2j]                    column i of the quad
//     2-bit plane   2          register j:  [quad 4j+3 | 4j+2 | 4j+1 | 4j]
//     1-bit plane   1          [quad 7 | 6 | 5 | 4 | 3 | 2 | 1 | 0]
//     bytes         8          register j:  quad j
//
// so that a quad of 4 or 2 bits takes a shift and a mask, and one of 3 bits two of each.
//
//     scale  fp16  [blocks, groups, 16]      absent: 1
//     zero   uint8 [blocks, groups, 16]      codec int, asymmetric; else the zero point is 2^(bits-1), of 1 bit 1/2
//
// A group is group_size columns, a multiple of 32 (0: the whole row), so a tile lies in one group; the last group may
// be short. Rows and columns beyond the weight's own have code 0 and scale 0.
//
// Codec lut: 4 to 16 entries, value = table[code] * scale. Multiplying with int8 inputs, entries are bytes:
//
//     table  fp16  [entries], or [out, entries] with a table for each row
//     bytes  uint8 [16], or [blocks, ceil(entries / 4), 16 rows, 4]      table entry = (byte - 128) * unit, about
//     unit   f32   [1], or [blocks, 16]
//
// where a byte shuffle looks 16 bytes up: one table of 16, or four entries of each of four rows.
#pragma once

#include "codes_unit.h"
#include "linear.h"

namespace bitpalette {

// The tensors above; null where there is none. They stay the caller's.
struct CodesParts {
    const uint8_t* codes;
    const uint16_t* scale;
    const uint8_t* zero;
    const uint16_t* table;
    const uint8_t* table_bytes;
    const float* table_unit;
    bool table_by_row;
    int entries; // of a table
    int bits;
    int64_t out, in, group_size;
};

class CodesWeight : public LinearWeight {
  public:
    // form: int8_by_32, int16_by_256 (codec int) or f32. std::invalid_argument where sizes, form and parts do not fit,
    // or the machine lacks the instruction set.
    CodesWeight(Isa isa, InputForm form, const CodesParts& parts);

    InputForm form() const override { return form_; }
    int64_t bytes() const override;
    void multiply(const Activations& x, float* y, int64_t y_row, int64_t begin, int64_t end) const override;
    const PanelKind* panel() const override { return panel_.unit == nullptr ? nullptr : &panel_; }
    void unpack(int64_t block, int64_t begin, int64_t end, const PanelBlock& to) const override;
    void decode(const int64_t* index, int64_t begin, int64_t end, float* rows) const override;

  private:
    InputForm form_;
    CodesView view_;
    CodesFunctions functions_;
    PanelKind panel_;
    float levels_[16] = {}; // the one table in float32
};

} // namespace bitpalette
