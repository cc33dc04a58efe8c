// Attention over the cache for any machine.
#include "attention_decode_body.h"
#include "float_lanes_scalar.h"

namespace bitpalette {
const AttentionUnit attention_scalar = attention_unit<Scalar>;
} // namespace bitpalette
