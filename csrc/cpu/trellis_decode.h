// Decoding rows of codec `trellis`, straight from the canonical layout (trellis_code.h). y = x W^T: trellis_linear.h.
#pragma once

#include <cstdint>

#include "isa.h"
#include "trellis_code.h"

namespace bitpalette {

struct TrellisWeight {
    const uint8_t* codes; // [ceil(out / 16), ceil(in / 16), 2 m]
    const float* scale;   // [out]
    int64_t out, in;
    TrellisCode code;

    int64_t tiles() const { return (in + trellis_side - 1) / trellis_side; } // in a row of tiles
};

// y [n, in] float32 = rows `index` of W, each exactly float(level) * (scale / 128). index null:
// all rows, n = out, or none.
// std::invalid_argument for sizes, rates, windows or rows that do not exist, or a missing instruction set.
void trellis_decode(Isa isa, const TrellisWeight& w, const int64_t* index, int64_t n, float* y, int threads);

} // namespace bitpalette
