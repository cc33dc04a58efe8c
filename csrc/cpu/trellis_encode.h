// The encoder of codec `trellis`: an exact search (Viterbi) over all 2^L states for every tile.
#pragma once

#include <cstdint>

#include "isa.h"
#include "trellis_code.h"

namespace bitpalette {

// x [tiles, 256] in levels, finite; codes [tiles, 2 m] out; levels [tiles, 256] out, those that were chosen, or null.
// On up to `threads` threads, the same result on every instruction set and any number of threads. Returns how many
// tiles the 16-bit search had to leave to the 64-bit one. std::invalid_argument for an instruction set that this
// machine lacks, a rate or a window that does not exist.
int64_t trellis_encode(Isa isa, const float* x, int64_t tiles, const TrellisCode& code, uint8_t* codes, float* levels,
                       int threads);

} // namespace bitpalette
