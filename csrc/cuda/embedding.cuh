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
    float values[4];
    four_weights<F>(w, static_cast<int>(args.index[row]), k, values);
    store_up_to_four<D>(args.out, row * args.stride + k, values, static_cast<int>(w.k) - k);
}

// 0 or a cudaError_t; nothing is launched for no rows. std::invalid_argument where the sizes do not fit together.
int embedding(const EmbeddingArgs& args, void* stream);

} // namespace bitpalette
