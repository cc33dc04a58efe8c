// The parts that the blocks of kv_attention leave, put together in their order, and rotated back: a warp for each
// query.
#pragma once

#include "elements.cuh"
#include "kv_args.cuh"
#include "kv_softmax.cuh"

namespace bitpalette {

constexpr int kv_combine_warps = 4;

template <Dtype D>
BP_DEVICE void kv_store_row(void* out, int64_t at, const float* row, int width) {
    for (int i = static_cast<int>(ptx::lane()); i < width; i += 32)
        store_element<D>(out, at + i, row[i]);
}

template <int Unused>
BP_GLOBAL void BP_LAUNCH_BOUNDS(32 * kv_combine_warps, 8) kv_combine_kernel(const KvAttentionArgs args) {
    BP_DYNAMIC_SHARED(shared);
    const int lane = static_cast<int>(ptx::lane()), warp = static_cast<int>(ptx::warp());
    const int rows = args.group * args.tokens, width = args.head_dim_v;
    const int64_t query = static_cast<int64_t>(ptx::block()) * kv_combine_warps + warp;
    if (query >= static_cast<int64_t>(args.batch) * args.kv_heads * rows)
        return;
    const int64_t head = query / rows; // of all rows of the batch
    const int r = static_cast<int>(query % rows);
    const int64_t of_part = static_cast<int64_t>(rows) * (width + 2);
    const float* parts = args.parts + head * args.splits * of_part;
    const float* scores = parts + rows * width + r;

    float most = kv_least;
    for (int split = lane; split < args.splits; split += 32)
        most = ptx::max(most, scores[split * of_part]);
    BP_UNROLL
    for (int mask = 1; mask < 32; mask *= 2)
        most = ptx::max(most, ptx::shfl_xor(most, mask));
    const float* logits = args.sink_logits;
    const float logit =
        logits == nullptr ? kv_least : logits[head % args.kv_heads * args.group + r / args.tokens] * kv_log2e;
    most = ptx::max(most, logit);

    float sum[kv_lane_elements] = {}, weight = 0;
    for (int split = 0; split < args.splits; ++split) {
        const float* part = parts + split * of_part;
        const float factor = ptx::exp2_approx(part[rows * width + r] - most);
        weight += part[rows * (width + 1) + r] * factor;
        BP_UNROLL
        for (int k = 0; k < kv_lane_elements; ++k)
            if (lane + 32 * k < width)
                sum[k] += part[r * width + lane + 32 * k] * factor;
    }
    if (weight != 0 && logits != nullptr)
        weight += ptx::exp2_approx(logit - most);
    const float share = weight == 0 ? 0.0f : ptx::div(1.0f, weight);
    float* row = reinterpret_cast<float*>(shared) + warp * width;
    BP_UNROLL
    for (int k = 0; k < kv_lane_elements; ++k)
        if (lane + 32 * k < width)
            row[lane + 32 * k] = sum[k] * share;
    ptx::sync_warp();
    if (args.rotate_out)
        kv_rotate_row(row, args.rotation_out);
    if (args.out_dtype == Dtype::f32)
        kv_store_row<Dtype::f32>(args.out, query * width, row, width);
    else if (args.out_dtype == Dtype::f16)
        kv_store_row<Dtype::f16>(args.out, query * width, row, width);
    else
        kv_store_row<Dtype::bf16>(args.out, query * width, row, width);
}

} // namespace bitpalette
