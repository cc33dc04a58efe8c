// Attention over the cache for AVX-512.
#include "attention_decode_body.h"

#if BITPALETTE_X86
#include "float_lanes_avx512.h"

namespace bitpalette {
const AttentionUnit attention_avx512 = attention_unit<Avx512>;
} // namespace bitpalette
#endif
