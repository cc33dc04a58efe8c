// A small kernel with all that the large ones have: a pipeline of asynchronous copies, ldmatrix from swizzled rows,
// mma, a sum over warps through the same shared memory, ragged edges. The mutation tests break it in every way.
#pragma once

#include "ptx.cuh"

namespace bitpalette {

constexpr int demo_warps = 4, demo_stages = 3, demo_rows = 16, demo_tokens = 8;
constexpr int demo_row_bytes = 128; // of a stage: 64 columns, 16 for each warp
constexpr int demo_stage_bytes = (demo_rows + demo_tokens) * demo_row_bytes;

// The 16 bytes `chunk` of a row: columns 8 chunk .. 8 chunk + 7. Without the XOR, 8 rows would share 4 banks.
BP_DEVICE int demo_offset(int row, int chunk) {
    return row * demo_row_bytes + (BP_MUTATE(unswizzled, chunk, chunk ^ row % 8)) * 16;
}

// y [n, 8] = w [n, k] x^T [k, 8], fp16 to fp32; k a multiple of 8. Block b makes rows 16 b to 16 b + 15.
template <int Unused>
BP_GLOBAL void BP_LAUNCH_BOUNDS(32 * demo_warps, 1)
    demo_kernel(const uint16_t* w, const uint16_t* x, float* y, int n, int k) {
    using namespace ptx;
    BP_DYNAMIC_SHARED(shared);
    const int me = static_cast<int>(thread()), warp_index = static_cast<int>(warp());
    const int g = static_cast<int>(lane()) / 4, t = static_cast<int>(lane()) % 4;
    const int first_row = static_cast<int>(block()) * demo_rows;
    const int tiles = (k + 63) / 64;

    const auto load = [&](int tile, int stage) {
        uint8_t* const to = shared + stage * demo_stage_bytes;
        const int row = me / 8, chunk = me % 8, column = 64 * tile + 8 * chunk;
        const bool inside = BP_MUTATE(unguarded_load, true, first_row + row < n) && column < k;
        cp_async16(to + demo_offset(row, chunk), inside ? w + (first_row + row) * k + column : w, inside);
        if (me < 8 * demo_tokens)
            cp_async16(to + demo_rows * demo_row_bytes + demo_offset(row, chunk), column < k ? x + row * k + column : x,
                       column < k);
    };

    for (int stage = 0; stage < demo_stages - 1; ++stage) {
        if (stage < tiles)
            load(stage, stage);
        cp_async_commit();
    }
    float c[4] = {};
    for (int tile = 0; tile < tiles; ++tile) {
        cp_async_wait<demo_stages - BP_MUTATE(wait_off_by_one, 1, 2)>();
        BP_MUTATE(missing_barrier, (void)0, sync_threads());
        const int ahead = tile + demo_stages - 1;
        if (ahead < tiles)
            load(ahead, BP_MUTATE(prefetch_onto_live_stage, tile, ahead) % demo_stages);
        cp_async_commit();

        const uint8_t* const from = shared + tile % demo_stages * demo_stage_bytes;
        uint32_t a[4], b[2];
        ldmatrix_x4(a,
                    from + demo_offset(static_cast<int>(lane()) % 16, 2 * warp_index + static_cast<int>(lane()) / 16));
        for (int i = 0; i < 2; ++i)
            b[i] = lds(reinterpret_cast<const uint32_t*>(from + demo_rows * demo_row_bytes +
                                                         demo_offset(g, 2 * warp_index + i)) +
                       t);
        BP_MUTATE(swapped_fragment, const uint32_t other = a[1]; a[1] = a[2]; a[2] = other, (void)0);
        mma_f16(c, a, b);
    }
    cp_async_wait<0>();
    BP_MUTATE(early_reuse, (void)0, sync_threads()); // the stages become the sums [warp][row][token]
    float* const sums = reinterpret_cast<float*>(shared);
    for (int i = 0; i < 4; ++i)
        sums[warp_index * demo_rows * demo_tokens + (g + 8 * (i / 2)) * demo_tokens + 2 * t + i % 2] = c[i];
    BP_MUTATE(unsynchronized_sum, (void)0, sync_threads());
    float sum = 0.f;
    for (int i = 0; i < demo_warps; ++i)
        sum += sums[i * demo_rows * demo_tokens + me];
    if (BP_MUTATE(unguarded_edge, true, first_row + me / demo_tokens < n))
        y[first_row * demo_tokens + me] = sum;
}

} // namespace bitpalette
