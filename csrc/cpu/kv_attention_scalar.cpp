// Attention over the paged cache for any machine.
#include "kv_attention_body.h"
#include "kv_lanes_scalar.h"

namespace bitpalette {
const KvAttentionUnit kv_attention_scalar = kv_attention_unit<KvScalar>;
} // namespace bitpalette
