// What a decoder computes between its linear layers, for NEON.
#include "vector_math_body.h"

#if BITPALETTE_AARCH64
#include "float_lanes_neon.h"

namespace bitpalette {
const VectorMath vector_math_neon = vector_math_unit<Neon>;
} // namespace bitpalette
#endif
