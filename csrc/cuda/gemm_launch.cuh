// Plan and launch of any of the GEMMs, for a kernel that is known.
#pragma once

#include "gemm.h"
#include "gemm_body.cuh"
#include "launch.cuh"

namespace bitpalette {

constexpr int cannot_launch = 1; // cudaErrorInvalidValue

// The shapes by number of tokens. A batch-invariant plan takes the same for all.
constexpr int shape_count = 4, invariant_shape = 1;
constexpr int shape_tokens[shape_count] = {8, 16, 32, 64};

using Shape8 = GemmShape<8, 2, 4>; // shape 0

template <class S, class F>
struct KernelTag {
    using Shape = S;
    using Format = F;
};

// act(KernelTag<Shape, Format>()) for a shape by number.
template <class Format, class Do>
int with_shape(int shape, Do&& act) {
    switch (shape) {
    case 0:
        return act(KernelTag<Shape8, Format>());
    case 1:
        return act(KernelTag<GemmShape<16, 2, 4>, Format>());
    case 2:
        return act(KernelTag<GemmShape<32, 4, 2>, Format>());
    case 3:
        return act(KernelTag<GemmShape<64, 4, 1, 2>, Format>());
    default:
        return cannot_launch;
    }
}

inline int shape_for(int tokens, bool batch_invariant) {
    if (batch_invariant)
        return invariant_shape;
    int shape = 0;
    while (shape + 1 < shape_count && tokens > shape_tokens[shape])
        ++shape;
    return shape;
}

inline int round_up_div(int value, int unit) {
    return (value + unit - 1) / unit;
}

// What depends on the weight alone.
template <class Format>
GemmArgs weight_args(const GemmWeight& weight) {
    const Container& w = weight.weight;
    const bool progressive = w.format == bitpalette::Format::progressive;
    const int bits = superblock_words(w.format, w.row_bits) / 128;
    GemmArgs args = {};
    args.codes = reinterpret_cast<const uint8_t*>(w.codes);
    args.scale = w.scale;
    args.row_zero = w.zero_point;
    if (Format::first_bytes) {
        args.first = progressive ? w.group_scale : reinterpret_cast<const uint8_t*>(w.scale);
        args.second = progressive ? w.group_offset : w.zero_point;
    }
    args.bias = weight.bias;
    args.rows = static_cast<int>(w.n);
    args.columns = static_cast<int>(w.k);
    args.halves = w.group_size == 32 ? 2 : 1;
    args.group_shift = 30;
    if (w.group_size)
        for (args.group_shift = 0; block_side << args.group_shift < w.group_size;)
            ++args.group_shift;
    args.fragment = {w.table, w.row_bits, w.window, 1u << (bits - 1)};
    return args;
}

// Whether a group's number is that of a superblock shifted.
inline bool groups_are_known(const Container& w) {
    return w.group_size == 0 || w.group_size == 32 || (w.group_size >= 64 && (w.group_size & (w.group_size - 1)) == 0);
}

template <class Shape>
StreamK stream_k(const GemmWeight& weight, int tokens, int shares, bool whole) {
    const int tiles =
        round_up_div(int(weight.weight.n), block_side * Shape::blocks_n) * round_up_div(tokens, Shape::tokens);
    const int steps = round_up_div(int(weight.weight.k), block_side * Shape::warps_k);
    const int most = whole ? tiles : tiles * steps;
    return {tiles, steps, shares < most ? shares : most, whole};
}

template <class Shape, class Format>
int plan_gemm(const GemmWeight& weight, int tokens, bool batch_invariant, int shares, int shared_limit,
              GemmPlan* plan) {
    if (!shared_limit)
        if (const int error = shared_memory_of_block(&shared_limit))
            return error;
    const GemmLayout<Shape, Format> layout(weight_args<Format>(weight));
    // two blocks to a multiprocessor where each then has four steps under way, else one with as many as fit
    const int room = layout.shared_bytes(4) <= shared_limit / 2 ? shared_limit / 2 : shared_limit;
    const int stages = (room - layout.shared_bytes(0)) / layout.stage;
    if (stages < 2)
        return cannot_launch;
    plan->stages = stages >= 6 ? 6 : stages >= 4 ? 4 : stages;
    plan->shared_bytes = layout.shared_bytes(plan->stages);
    if (!shares)
        if (const int error = resident_blocks(gemm_kernel<Shape, Format>, Shape::threads, plan->shared_bytes, &shares))
            return error;
    const StreamK work = stream_k<Shape>(weight, tokens, shares, batch_invariant);
    plan->whole = batch_invariant;
    plan->shares = work.shares;
    plan->part_words = int64_t(2) * work.shares * Shape::blocks_n * block_side * Shape::tokens;
    plan->counters = work.tiles;
    return work.fits() ? 0 : cannot_launch;
}

template <class Shape, class Format>
int launch_gemm(const GemmWeight& weight, const GemmPlan& plan, const GemmTokens& tokens, void* parts, void* counters,
                void* stream) {
    GemmArgs args = weight_args<Format>(weight);
    args.x = tokens.x;
    args.x_stride = tokens.x_stride;
    args.row_bytes = tokens.x_bytes;
    args.token_scale = tokens.scale;
    args.token_sum = tokens.sum;
    args.tokens = tokens.tokens;
    args.y = tokens.y;
    args.y_stride = tokens.y_stride;
    args.parts = static_cast<uint32_t*>(parts);
    args.arrived = static_cast<unsigned*>(counters);
    args.work = stream_k<Shape>(weight, tokens.tokens, plan.shares, plan.whole);
    args.stages = plan.stages;
    if (!groups_are_known(weight.weight) || tokens.tokens < 1 || args.work.tiles > plan.counters ||
        tokens.x_stride % 16 || tokens.x_bytes % 16 || reinterpret_cast<uintptr_t>(tokens.x) % 16)
        return cannot_launch;
    return launch(gemm_kernel<Shape, Format>, args.work.shares, Shape::threads, plan.shared_bytes, stream, args);
}

} // namespace bitpalette
