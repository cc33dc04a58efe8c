// R x of one vector by one warp, in shared memory: the transform of a head (quant/kv_token.py `rotate`), to the bit.
//
// x of p 2^k elements is [p, 2^k]: the Hadamard stages from the closest pairs on, times 2^-k/2, then the p x p Hartley
// matrix; additions in the order of that definition and never fused with products.
#pragma once

#include "ptx.cuh"

namespace bitpalette {

constexpr int kv_most_width = 256; // elements of a vector; 8 a lane
constexpr int kv_lane_elements = kv_most_width / 32;

struct KvRotation {
    const float* matrix; // DHT_p, [p, p]; null: p = 1
    int odd, log2;       // p, k
    float unit;          // 2^(-k/2)
};

// All lanes; row [p 2^k] is written by this warp alone, and settled (sync_warp) before and after.
BP_DEVICE void kv_rotate_row(float* row, const KvRotation& r) {
    const int lane = static_cast<int>(ptx::lane()), width = r.odd << r.log2;
    for (int stage = 0; stage < r.log2; ++stage) {
        for (int i = lane; i < width / 2; i += 32) {
            const int at = (i >> stage << (stage + 1)) | (i & ((1 << stage) - 1)), other = at + (1 << stage);
            const float a = row[at], b = row[other];
            row[at] = ptx::add(a, b);
            row[other] = ptx::add(a, -b);
        }
        ptx::sync_warp();
    }
    float sum[kv_lane_elements];
    BP_UNROLL
    for (int k = 0; k < kv_lane_elements; ++k) {
        const int i = lane + 32 * k;
        if (i < width) {
            if (r.odd == 1) {
                sum[k] = ptx::mul(row[i], r.unit);
            } else {
                const int column = i & ((1 << r.log2) - 1);
                const float* factors = r.matrix + (i >> r.log2) * r.odd;
                sum[k] = ptx::mul(factors[0], ptx::mul(row[column], r.unit));
                for (int j = 1; j < r.odd; ++j)
                    sum[k] = ptx::add(sum[k], ptx::mul(factors[j], ptx::mul(row[(j << r.log2) + column], r.unit)));
            }
        }
    }
    ptx::sync_warp();
    BP_UNROLL
    for (int k = 0; k < kv_lane_elements; ++k)
        if (lane + 32 * k < width)
            row[lane + 32 * k] = sum[k];
    ptx::sync_warp();
}

} // namespace bitpalette
