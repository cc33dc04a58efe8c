// Attention over the cache for NEON.
#include "attention_decode_body.h"

#if BITPALETTE_AARCH64
#include "float_lanes_neon.h"

namespace bitpalette {
const AttentionUnit attention_neon = attention_unit<Neon>;
} // namespace bitpalette
#endif
