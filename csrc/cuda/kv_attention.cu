#include <algorithm>
#include <stdexcept>
#include <string>

#include "kv_attention_launch.cuh"
#include "kv_combine.cuh"

namespace bitpalette {
namespace {

void check(const KvAttentionArgs& a) {
    const auto refuse = [](const std::string& what) { throw std::invalid_argument("kv attention: " + what); };
    for (const int bits : {a.bits_k, a.bits_v})
        if (bits != 2 && bits != 3 && bits != 4 && bits != 8)
            refuse(std::to_string(bits) + " bits; 2, 3, 4 and 8 have a kernel");
    if (a.batch < 1 || a.kv_heads < 1 || a.group < 1)
        refuse(std::to_string(a.batch) + " rows of " + std::to_string(a.group) + " times " +
               std::to_string(a.kv_heads) + " heads");
    if (a.tokens < 1 || a.tokens > kv_most_tokens)
        refuse(std::to_string(a.tokens) + " new tokens; 1 to " + std::to_string(kv_most_tokens) + " at a time");
    for (const int width : {a.head_dim, a.head_dim_v})
        if (width < 16 || width % 16 != 0 || width > kv_most_width)
            refuse("a head_dim of " + std::to_string(width) + "; multiples of 16 up to " +
                   std::to_string(kv_most_width) + " have a kernel");
    if (a.splits < 1 || a.splits > kv_most_splits || a.dense_splits < 0 || a.dense_splits > a.splits ||
        (a.dense_splits == a.splits && a.table_row > 0) || a.parts == nullptr)
        refuse(std::to_string(a.splits) + " splits, " + std::to_string(a.dense_splits) + " of them dense, and " +
               std::to_string(a.table_row) + " pages a row; 1 to " + std::to_string(kv_most_splits) +
               ", one for pages where there are any, with room for parts");
    const int64_t blocks = static_cast<int64_t>(a.batch) * a.kv_heads * a.splits * a.group * a.tokens;
    if (blocks > INT32_MAX)
        refuse(std::to_string(blocks) + " splits of queries are too many for a launch");
    const void* wide[] = {a.k_codes, a.v_codes, a.k_gain, a.v_gain, a.parts};
    for (const void* address : wide)
        if (reinterpret_cast<uintptr_t>(address) % 16 != 0)
            refuse("codes, gains or parts not aligned to 16 bytes");
    const int unit = a.dense_dtype == Dtype::f32 ? 4 : 8; // elements in 16 bytes
    for (const KvDense& d : a.dense) {
        if (d.lengths == nullptr)
            continue;
        bool aligned = reinterpret_cast<uintptr_t>(d.keys) % 16 == 0 && reinterpret_cast<uintptr_t>(d.values) % 16 == 0;
        for (const int64_t stride : {d.key_batch, d.key_token, d.key_head, d.value_batch, d.value_token, d.value_head})
            aligned &= stride % unit == 0;
        if (!aligned || d.slots < 1)
            refuse("tokens in 16 bits whose vectors are not aligned to 16 bytes, or of " + std::to_string(d.slots) +
                   " slots");
        if (a.dense_splits < 1)
            refuse("tokens in 16 bits, and no split for them");
    }
    const auto rotation = [&](bool rotate, const KvRotation& r, int width) {
        if (rotate && (r.odd << r.log2 != width || (r.odd > 1) != (r.matrix != nullptr)))
            refuse("a rotation of " + std::to_string(r.odd) + " * 2^" + std::to_string(r.log2) +
                   " elements for a head_dim of " + std::to_string(width));
    };
    rotation(a.rotate_q, a.rotation_q, a.head_dim);
    rotation(a.rotate_out, a.rotation_out, a.head_dim_v);
}

} // namespace

int kv_combine(const KvAttentionArgs& a, void* stream) {
    const int64_t queries = static_cast<int64_t>(a.batch) * a.kv_heads * a.group * a.tokens;
    return launch(kv_combine_kernel<0>, static_cast<unsigned>((queries + kv_combine_warps - 1) / kv_combine_warps),
                  32 * kv_combine_warps, static_cast<size_t>(kv_combine_warps * a.head_dim_v * 4), stream, a);
}

int kv_attention(const KvAttentionArgs& a, int shared_limit, void* stream) {
    check(a);
    const int width = std::max(a.head_dim, a.head_dim_v);
    const auto run = width > 128 ? kv_attention_256 : width > 64 ? kv_attention_128 : kv_attention_64;
    if (const int error = run(a, shared_limit, stream))
        return error;
    return kv_combine(a, stream);
}

} // namespace bitpalette
