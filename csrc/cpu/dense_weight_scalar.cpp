// Unquantized weights for any machine.
#include "dense_weight_body.h"
#include "float_lanes_scalar.h"

namespace bitpalette {
const DenseUnit dense_scalar = dense_unit<Scalar>;
} // namespace bitpalette
