#include "kv_attention.cuh"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "kv_combine.cuh"
#include "launch.cuh"

namespace bitpalette {
namespace {

// Shared memory that a block's rings may take where that leaves two stages: three blocks fit on a multiprocessor then.
constexpr int ring_target = 56 * 1024;
constexpr int most_stages = 4;

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

// Warps and stages: three or four stages where the rings stay below the target, two of fewer warps where the device has
// no room for more.
struct Shape {
    int warps, stages, shared;
};

Shape shape_of(const KvAttentionArgs& a, int width, int tiles, int limit) {
    const int stage = kv_stage_bytes(a.head_dim * a.bits_k / 8, a.head_dim_v * a.bits_v / 8);
    for (int warps = kv_most_warps; warps >= 1; warps /= 2) {
        const int stages = std::clamp(ring_target / (warps * stage), 2, most_stages);
        const int shared =
            kv_query_bytes(width, tiles) + std::max(warps * stages * stage, kv_result_bytes(width, tiles, warps));
        if (shared <= limit)
            return {warps, stages, shared};
    }
    throw std::invalid_argument("kv attention: stages of " + std::to_string(stage) + " bytes do not fit into " +
                                std::to_string(limit) + " bytes of shared memory");
}

template <int Width, int Tiles, int BitsK, int BitsV>
int start(const KvAttentionArgs& a, int shared_limit, void* stream) {
    const int rows = a.group * a.tokens, of_block = 8 * Tiles;
    const Shape shape = shape_of(a, Width, Tiles, shared_limit);
    const auto grid = static_cast<unsigned>(a.batch * a.kv_heads * a.splits * ((rows + of_block - 1) / of_block));
    if (const int error =
            launch(kv_attention_kernel<Width, Tiles, BitsK, BitsV>, grid, static_cast<unsigned>(32 * shape.warps),
                   static_cast<size_t>(shape.shared), stream, a, shape.warps, shape.stages))
        return error;
    const int64_t queries = static_cast<int64_t>(a.batch) * a.kv_heads * rows;
    return launch(kv_combine_kernel<0>, static_cast<unsigned>((queries + kv_combine_warps - 1) / kv_combine_warps),
                  32 * kv_combine_warps, static_cast<size_t>(kv_combine_warps * a.head_dim_v * 4), stream, a);
}

// Kernels that know their bits, for up to eight queries a kv head: the pairs that plans choose most.
template <int Width>
int start_few(const KvAttentionArgs& a, int shared_limit, void* stream) {
    switch (16 * a.bits_k + a.bits_v) {
    case 0x44:
        return start<Width, 1, 4, 4>(a, shared_limit, stream);
    case 0x42:
        return start<Width, 1, 4, 2>(a, shared_limit, stream);
    case 0x33:
        return start<Width, 1, 3, 3>(a, shared_limit, stream);
    case 0x22:
        return start<Width, 1, 2, 2>(a, shared_limit, stream);
    default:
        return start<Width, 1, 0, 0>(a, shared_limit, stream);
    }
}

} // namespace

int kv_attention(const KvAttentionArgs& a, int shared_limit, void* stream) {
    check(a);
    const int width = std::max(a.head_dim, a.head_dim_v);
    const bool few = a.group * a.tokens <= 8;
    if (width > 128) // the outputs of 16 queries would be 128 registers
        return start<256, 1, 0, 0>(a, shared_limit, stream);
    if (width > 64)
        return few ? start_few<128>(a, shared_limit, stream) : start<128, 2, 0, 0>(a, shared_limit, stream);
    return few ? start_few<64>(a, shared_limit, stream) : start<64, 2, 0, 0>(a, shared_limit, stream);
}

} // namespace bitpalette
