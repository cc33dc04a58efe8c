// y = x W^T with a weight of codec `trellis`, decoded in registers on the way, straight from the canonical layout.
//
// All in integers: with bytes b of state * 0x83DCD12D, sum over columns of x * (sum of b - 510) needs no level as a
// float. 32 windows of 16 bits are multiplied at a time; the low and the high halves of the products are
//
//     low = state * 0xD12D mod 2^16        high = (state * 0xD12D >> 16) + state * 0x83DC mod 2^16
//
// and either all four bytes meet an int8 input (vpdpbusd twice), or their sum, 16 bits, meets int16 inputs, which is
// cheaper from three tokens on and as good as exact. trellis_input.h has the inputs.
//
// Most instruction sets take a row of a tile at a time (trellis_linear_body.h), AVX-512 with VBMI takes eight
// (trellis_linear_avx512vbmi.cpp).
#pragma once

#include <cstdint>
#include <vector>

#include "linear.h"
#include "trellis_linear_unit.h"

namespace bitpalette {

class TrellisLinear final : public LinearWeight {
  public:
    // form: f32, int8_by_256 or int16_by_256. codes as in TrellisWeight; scale [out] fp16, copied.
    // std::invalid_argument for sizes, rates, windows or forms that do not exist, or a missing instruction set.
    TrellisLinear(Isa isa, InputForm form, const uint8_t* codes, const uint16_t* scale, int64_t out, int64_t in,
                  TrellisCode code);

    InputForm form() const override { return form_; }
    // A byte a weight: decoding runs at about 20 G weights/s, which is what a thread reads in bytes.
    int64_t bytes() const override { return out * in; }
    void multiply(const Activations& x, float* y, int64_t y_row, int64_t begin, int64_t end) const override;
    const PanelKind* panel() const override { return panel_.unit == nullptr ? nullptr : &panel_; }
    void unpack(int64_t block, int64_t begin, int64_t end, const PanelBlock& to) const override;
    void decode(const int64_t* index, int64_t begin, int64_t end, float* rows) const override;

  private:
    std::vector<float> scale_;
    TrellisWeight weight_;
    TrellisLinearUnit unit_;
    InputForm form_;
    PanelKind panel_;
};

} // namespace bitpalette
