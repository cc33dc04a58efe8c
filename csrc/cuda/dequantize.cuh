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
    const int n16 = static_cast<int>(strip % 4), lane = static_cast<int>(ptx::lane());
    const int n = static_cast<int>(strip / (4 * across)) * superblock + n16 * tile_side + lane / 4;
    const int first = static_cast<int>(strip / 4 % across) * superblock;
    if (n >= w.n)
        return;
    const uint32_t* words = superblock_at<F>(w, n, first);
    const bool aligned = aligned_to_four<D>(args.out, args.stride);
    const int columns = static_cast<int>(w.k) - first;
    const int group = group_of(w, first);
    BP_UNROLL
    for (int half = 0; half < 2; ++half) {
        if (n + 8 * half >= w.n)
            return;
        Parameters a = parameters_at<F>(w, n + 8 * half, group);
        const int64_t to = (n + 8 * half) * args.stride + first;
        BP_UNROLL
        for (int k16 = 0; k16 < 4; ++k16) {
            const int k = k16 * tile_side + lane % 4 * 4;
            if (k16 == BP_MUTATE(dequantize_late_group, 3, 2) && w.group_size == 32 && columns > 32)
                a = parameters_at<F>(w, n + 8 * half, group + 1);
            if (k < columns) {
                float values[4];
                BP_UNROLL
                for (int j = 0; j < 4; ++j)
                    values[j] = weight_at<F>(w, words, {n16, k16, lane, half, j}, a);
                store_up_to_four<D>(args.out, to + k, values, BP_MUTATE(dequantize_unguarded_edge, 4, columns - k),
                                    aligned);
            }
        }
    }
}

// 0 or a cudaError_t. std::invalid_argument where the sizes do not fit together.
int dequantize(const DequantizeArgs& args, void* stream);

} // namespace bitpalette
