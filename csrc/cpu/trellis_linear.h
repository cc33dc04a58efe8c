// y = x W^T with a weight of codec `trellis`, decoded in registers on the way, straight from the canonical layout.
//
// A vector is one row of a tile: 16 weights share the at most 98 bits from their row's first byte on, so 16 bytes of
// the tile, given to all lanes, hold every window. A byte shuffle brings each lane the bytes of its own window, a shift
// by 0 to 7 bits and a mask make it a state. For row r = 1 of m = 20:
//
//     bit of the tile   16       24       32       40 ...       lane c starts at bit 20 + floor(20 c / 16):
//     byte               2        3        4        5 ...       lane 0: bytes 2 3 4 >> 4, lane 1: bytes 2 3 4 >> 5,
//                        [.... 16 bytes, loaded once ....       lane 3: bytes 2 3 4 >> 7, lane 4: bytes 3 4 5 >> 1
//
// The shuffle and the shifts belong to (m, r) and stay in registers for the whole row. Only row 15 reads across the
// tile's cyclic end; its last 14 and first 2 bytes are joined beforehand.
#pragma once

#include <cstdint>

#include "isa.h"
#include "trellis_decode.h"

namespace bitpalette {

// y [tokens, out] = x [tokens, in] W^T, in float32, on up to `threads` threads, of which the result does not depend.
// std::invalid_argument for sizes, rates or windows that do not exist, or a missing instruction set.
void trellis_linear(Isa isa, const TrellisWeight& w, const float* x, int64_t tokens, float* y, int threads);

} // namespace bitpalette
