// Attention over the paged cache for AVX-512 with VNNI.
#include "kv_attention.h"

#if BITPALETTE_X86
#include "kv_lanes_avx512.h" // first: it silences gcc 12's warnings of its own header

#include "kv_attention_body.h"

namespace bitpalette {
const KvAttentionUnit kv_attention_avx512 = kv_attention_unit<KvAvx512>;
} // namespace bitpalette
#endif
