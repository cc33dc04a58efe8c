// Attention over the paged cache for AVX2 with AVX-VNNI.
#include "kv_attention_body.h"

#if BITPALETTE_AVXVNNI
#include "dot_avxvnni.h"
#include "kv_lanes_avx2.h"

namespace bitpalette {
namespace {

struct KvAvxVnni : KvAvx2 {
    template <bool Wide>
    static Ints dot(Ints sum, Ints codes, Ints x) {
        return dot_bytes(sum, codes, x);
    }
};

} // namespace

const KvAttentionUnit kv_attention_avxvnni = kv_attention_unit<KvAvxVnni>;

} // namespace bitpalette
#endif
