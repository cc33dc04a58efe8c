// Levels of all states as the search reads them.
#pragma once

#include <cstdint>

namespace bitpalette {

// Bits after the point of levels and inputs, by rate. The finer they are the lower is the cost at which a row clips:
// 12, 48 or 192 squared deviations. What weights at the seam may cost, forced to a state, falls with the rate, and so
// does what is lost by rounding. Measured at L = 12 against the exact search: below .002 dB up to 4 bits, .009 at 5.
constexpr int trellis_fixed(int m) {
    return m < 32 ? 16 : m < 52 ? 32 : 64;
}

// int16 [2^window]: `fixed` * level of all states, in the order in which a step reads vectors of `lanes` states
// (trellis_step.h); in their own order for 1 lane. Made once for each set of arguments, 64-byte aligned.
const int16_t* trellis_levels(int fixed, int window, int lanes, int expand, int fold);

} // namespace bitpalette
