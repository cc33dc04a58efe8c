// Attention over the packed cache, head_dim up to 64.
#include "kv_attention_launch.cuh"

namespace bitpalette {

int kv_attention_64(const KvAttentionArgs& args, int shared_limit, void* stream) {
    if (args.group * args.tokens <= 8)
        return kv_start_few<64>(args, shared_limit, stream);
    return kv_start<64, 2, 0, 0>(args, shared_limit, stream);
}

} // namespace bitpalette
