// The search once more, in 64 bits and plain loops, for the few tiles whose costs do not fit 16 bits.
#pragma once

#include <cstdint>

#include "trellis_code.h"

namespace bitpalette {

// The states of the best cyclic path for x [256], as TrellisSearch finds them: a free pass from `lead` steps before the
// seam for the seam's state, then one that starts and ends there. path [lead + 256] by steps; those before the seam are
// left alone. levels [2^window] and x are in the same fixed point. Some hundred times slower, and always succeeds.
void trellis_search_exactly(const TrellisCode& code, const int16_t* levels, const int16_t* x, int lead, uint16_t* path);

} // namespace bitpalette
