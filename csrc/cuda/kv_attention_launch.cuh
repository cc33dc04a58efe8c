// How the kernels of attention over the packed cache are started; a file kv_attention_WIDTH.cu has those of a width.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "kv_attention.cuh"
#include "launch.cuh"

namespace bitpalette {

// Shared memory that a block's rings may take where that leaves two stages: three blocks fit on a multiprocessor then.
constexpr int kv_ring_target = 56 * 1024;
constexpr int kv_most_stages = 4;

// Warps and stages: three or four stages where the rings stay below the target, two of fewer warps where the device has
// no room for more.
struct KvShape {
    int warps, stages, shared;
};

inline KvShape kv_shape_of(const KvAttentionArgs& a, int width, int tiles, int limit) {
    const auto bytes = [&](int stages) {
        return kv_warp_bytes(width, a.bits_k, a.bits_v, a.head_dim, a.head_dim_v, stages);
    };
    for (int warps = kv_most_warps; warps >= 1; warps /= 2) {
        int stages = kv_most_stages;
        while (stages > 2 && warps * bytes(stages) > kv_ring_target)
            --stages;
        const int shared =
            kv_query_bytes(width, tiles) + std::max(warps * bytes(stages), kv_result_bytes(width, tiles, warps));
        if (shared <= limit)
            return {warps, stages, shared};
    }
    throw std::invalid_argument("kv attention: " + std::to_string(bytes(2)) + " bytes for a warp do not fit into " +
                                std::to_string(limit) + " bytes of shared memory");
}

template <int Width, int Tiles, int BitsK, int BitsV>
int kv_start(const KvAttentionArgs& a, int shared_limit, void* stream) {
    const int rows = a.group * a.tokens, of_block = 8 * Tiles;
    const KvShape shape = kv_shape_of(a, Width, Tiles, shared_limit);
    const auto grid = static_cast<unsigned>(a.batch * a.kv_heads * a.splits * ((rows + of_block - 1) / of_block));
    return launch(kv_attention_kernel<Width, Tiles, BitsK, BitsV>, grid, static_cast<unsigned>(32 * shape.warps),
                  static_cast<size_t>(shape.shared), stream, a, shape.warps, shape.stages);
}

// For up to eight queries a kv head: kernels that know their bits, which are the pairs that plans choose most.
template <int Width>
int kv_start_few(const KvAttentionArgs& a, int shared_limit, void* stream) {
    const bool whole = a.head_dim == Width && a.head_dim_v == Width;
    switch (whole ? 16 * a.bits_k + a.bits_v : 0) {
    case 0x44:
        return kv_start<Width, 1, 4, 4>(a, shared_limit, stream);
    case 0x42:
        return kv_start<Width, 1, 4, 2>(a, shared_limit, stream);
    case 0x33:
        return kv_start<Width, 1, 3, 3>(a, shared_limit, stream);
    case 0x22:
        return kv_start<Width, 1, 2, 2>(a, shared_limit, stream);
    default:
        return kv_start<Width, 1, 0, 0>(a, shared_limit, stream);
    }
}

// 0 or a cudaError_t, of the kernel without the one that puts its parts together.
int kv_attention_64(const KvAttentionArgs& args, int shared_limit, void* stream);
int kv_attention_128(const KvAttentionArgs& args, int shared_limit, void* stream);
int kv_attention_256(const KvAttentionArgs& args, int shared_limit, void* stream);

} // namespace bitpalette
