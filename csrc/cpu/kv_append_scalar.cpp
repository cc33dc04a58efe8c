// New tokens of the paged cache for any machine.
#include "float_lanes_scalar.h"
#include "kv_append_body.h"

namespace bitpalette {
const KvAppendUnit kv_append_scalar = kv_append_unit<Scalar>;
} // namespace bitpalette
