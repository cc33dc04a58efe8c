// New tokens of the paged cache for AVX2.
#include "kv_append_body.h"

#if BITPALETTE_X86
#include "float_lanes_avx2.h"

namespace bitpalette {
const KvAppendUnit kv_append_avx2 = kv_append_unit<Avx2>;
} // namespace bitpalette
#endif
