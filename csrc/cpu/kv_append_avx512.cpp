// New tokens of the paged cache for AVX-512.
#include "kv_append_body.h"

#if BITPALETTE_X86
#include "float_lanes_avx512.h"

namespace bitpalette {
const KvAppendUnit kv_append_avx512 = kv_append_unit<Avx512>;
} // namespace bitpalette
#endif
