// run_kv_attention with one kernel only, for 4 bits, head_dim 64 and up to eight queries: quick to build.
#include "kv_attention_entry.cpp"
#include "kv_attention_launch.cuh"

namespace bitpalette {

int kv_attention_64(const KvAttentionArgs& args, int shared_limit, void* stream) {
    return kv_start<64, 1, 4, 4>(args, shared_limit, stream);
}
int kv_attention_128(const KvAttentionArgs&, int, void*) {
    return 1;
}
int kv_attention_256(const KvAttentionArgs&, int, void*) {
    return 1;
}

} // namespace bitpalette
