// Attention over the packed cache, head_dim up to 256: the outputs of 16 queries would be 128 registers, so eight.
#include "kv_attention_launch.cuh"

namespace bitpalette {

int kv_attention_256(const KvAttentionArgs& args, int shared_limit, void* stream) {
    return kv_start<256, 1, 0, 0>(args, shared_limit, stream);
}

} // namespace bitpalette
