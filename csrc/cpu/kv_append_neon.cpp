// New tokens of the paged cache for NEON.
#include "kv_append_body.h"

#if BITPALETTE_AARCH64
#include "float_lanes_neon.h"

namespace bitpalette {
const KvAppendUnit kv_append_neon = kv_append_unit<Neon>;
} // namespace bitpalette
#endif
