// Attention over the paged cache for AVX2.
#include "kv_attention_body.h"

#if BITPALETTE_X86
#include "kv_lanes_avx2.h"

namespace bitpalette {
const KvAttentionUnit kv_attention_avx2 = kv_attention_unit<KvAvx2>;
} // namespace bitpalette
#endif
