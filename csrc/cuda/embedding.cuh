// Rows of the weight by index, as the codec decodes them and rounded once: what an embedding looks up.
//
// Every index must be in 0..n-1. The kernel does not look, as that would need the host to wait for an answer: the
// caller checks, as for torch's own embedding on a GPU.
#pragma once

#include "container.cuh"
#include "elements.cuh"

namespace bitpalette {

constexpr int embedding_threads = 128; // four columns each

struct EmbeddingArgs {
    Container weight;
    const int64_t* index; // [rows]
    void* out;            // [rows, stride] of dtype
    int64_t rows;
    int64_t stride; // elements from row to row, k or more; columns from k on are not written
    Dtype dtype;
};

// Blocks of a row, which has four columns for a thread.
BP_HOST_DEVICE int64_t embedding_blocks(int64_t columns) {
    return (columns + 4 * embedding_threads - 1) / (4 * embedding_threads);
}

template <Format F, Dtype D>
BP_GLOBAL void BP_LAUNCH_BOUNDS(embedding_threads, 8) embedding_kernel(const EmbeddingArgs args) {
    const Container& w = args.weight;
    const int64_t blocks = embedding_blocks(w.k);
    const int64_t row = ptx::block() / blocks;
    const int k = 4 * static_cast<int>(ptx::block() % blocks * embedding_threads + ptx::thread());
    if (k >= w.k)
        return;
    const int n = static_cast<int>(args.index[row]);
    const uint32_t* words = superblock_at<F>(w, n, k);
    const Parameters a = parameters_at<F>(w, n, group_of(w, k));
    const int n16 = n % superblock / tile_side, k16 = k % superblock / tile_side;
    const int lane = n % 8 * 4 + k % tile_side / 4, half = n % tile_side / 8;
    float values[4];
    BP_UNROLL
    for (int j = 0; j < 4; ++j)
        values[j] = weight_at<F>(w, words, {n16, k16, lane, half, j}, a);
    store_up_to_four<D>(args.out, row * args.stride + k, values, static_cast<int>(w.k) - k,
                        aligned_to_four<D>(args.out, args.stride));
}

// 0 or a cudaError_t; nothing is launched for no rows. std::invalid_argument where the sizes do not fit together.
int embedding(const EmbeddingArgs& args, void* stream);

} // namespace bitpalette
