// Attention over the paged cache for NEON.
#include "kv_attention_body.h"

#if BITPALETTE_AARCH64
#include "kv_lanes_neon.h"

namespace bitpalette {
const KvAttentionUnit kv_attention_neon = kv_attention_unit<KvNeon>;
} // namespace bitpalette
#endif
