// Attention over the cache for AVX2.
#include "attention_decode_body.h"

#if BITPALETTE_X86
#include "float_lanes_avx2.h"

namespace bitpalette {
const AttentionUnit attention_avx2 = attention_unit<Avx2>;
} // namespace bitpalette
#endif
