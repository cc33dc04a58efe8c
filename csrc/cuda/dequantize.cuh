// The whole weight, dense, as the codec decodes it and rounded once: for products with many tokens, which cuBLAS takes.
//
// A warp decodes a row of tiles of a superblock, 16 rows x 64 columns; a lane as it owns weights in the container, so
// its words are read once and four lanes write 32 bytes of a row.
#pragma once

#include "container.cuh"
#include "elements.cuh"

namespace bitpalette {

constexpr int dequantize_threads = 256;

struct DequantizeArgs {
    Container weight;
    void* out;      // [n, stride] of dtype
    int64_t stride; // elements from row to row, k or more; columns from k on are not written
    Dtype dtype;
};

template <Format F, Dtype D>
BP_GLOBAL void BP_LAUNCH_BOUNDS(dequantize_threads, 4) dequantize_kernel(const DequantizeArgs args) {
    const Container& w = args.weight;
    const int64_t strip = static_cast<int64_t>(ptx::block()) * (dequantize_threads / 32) + ptx::warp();
    const int64_t across = (w.k + superblock - 1) / superblock;
    const int first_row = static_cast<int>(strip / (4 * across) * superblock + strip % 4 * tile_side);
    const int first_column = static_cast<int>(strip / 4 % across * superblock);
    const int lane = static_cast<int>(ptx::lane());
    BP_UNROLL
    for (int k16 = 0; k16 < 4; ++k16)
        BP_UNROLL
    for (int half = 0; half < 2; ++half) {
        const int n = first_row + half * 8 + lane / 4;
        const int k = first_column + k16 * tile_side + lane % 4 * 4;
        if (n < w.n && k < w.k) {
            float values[4];
            four_weights<F>(w, n, k, values);
            store_up_to_four<D>(args.out, n * args.stride + k, values, static_cast<int>(w.k) - k);
        }
    }
}

// 0 or a cudaError_t. std::invalid_argument where the sizes do not fit together.
int dequantize(const DequantizeArgs& args, void* stream);

} // namespace bitpalette
