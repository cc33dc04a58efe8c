// What a decoder computes between its linear layers, for any machine.
#include "float_lanes_scalar.h"
#include "vector_math_body.h"

namespace bitpalette {
const VectorMath vector_math_scalar = vector_math_unit<Scalar>;
} // namespace bitpalette
