// Unquantized weights for NEON.
#include "dense_weight_body.h"

#if BITPALETTE_AARCH64
#include "float_lanes_neon.h"

namespace bitpalette {
const DenseUnit dense_neon = dense_unit<Neon>;
} // namespace bitpalette
#endif
