// The formats of gemm_w4a16 for one type of activations: a .cu file each, so that they compile side by side.
#pragma once

#include "gemm_launch.cuh"
#include "gemm_w4a16.cuh"

namespace bitpalette {

// The rates of the codec's presets have kernels of their own where the decoder is what takes the time: with few tokens.
template <class Act, class Do>
int with_trellis16(int row_bits, int shape, Do&& act) {
    if (shape == 0)
        switch (superblock_words(Format::trellis, row_bits) / (tiles_along * tiles_along)) {
        case 16: // words of a tile: 2 bits
            return act(KernelTag<Shape8, W4A16<TrellisFragment<Act, 16>>>());
        case 20: // 2.5
            return act(KernelTag<Shape8, W4A16<TrellisFragment<Act, 20>>>());
        case 24: // 3
            return act(KernelTag<Shape8, W4A16<TrellisFragment<Act, 24>>>());
        case 28: // 3.5
            return act(KernelTag<Shape8, W4A16<TrellisFragment<Act, 28>>>());
        case 32: // 4
            return act(KernelTag<Shape8, W4A16<TrellisFragment<Act, 32>>>());
        }
    return with_shape<W4A16<TrellisFragment<Act>>>(shape, act);
}

template <class Act, class Do>
int with_format16(const Container& weight, int shape, Do&& act) {
    switch (weight.format) {
    case Format::int2:
        return with_shape<W4A16<IntFragment<Act, 2>>>(shape, act);
    case Format::int3:
        return with_shape<W4A16<IntFragment<Act, 3>>>(shape, act);
    case Format::int4:
        return with_shape<W4A16<IntFragment<Act, 4>>>(shape, act);
    case Format::int8:
        return with_shape<W4A16<IntFragment<Act, 8>>>(shape, act);
    case Format::lut2:
        return with_shape<W4A16<LutFragment<Act, 2>>>(shape, act);
    case Format::lut3:
        return with_shape<W4A16<LutFragment<Act, 3>>>(shape, act);
    case Format::lut4:
        return with_shape<W4A16<PairFragment<Act>>>(shape, act);
    case Format::e4m3:
        return with_shape<W4A16<E4M3Fragment<Act>>>(shape, act);
    case Format::trellis:
        return with_trellis16<Act>(weight.row_bits, shape, act);
    default:
        return cannot_launch;
    }
}

template <class Act>
int plan16(const GemmWeight& weight, int tokens, bool batch_invariant, int shares, int shared_limit, GemmPlan* plan) {
    plan->shape = shape_for(tokens, batch_invariant);
    return with_format16<Act>(weight.weight, plan->shape, [&](auto tag) {
        return plan_gemm<typename decltype(tag)::Shape, typename decltype(tag)::Format>(weight, tokens, batch_invariant,
                                                                                        shares, shared_limit, plan);
    });
}

template <class Act>
int launch16(const GemmWeight& weight, const GemmPlan& plan, const GemmTokens& tokens, void* parts, void* counters,
             void* stream) {
    return with_format16<Act>(weight.weight, plan.shape, [&](auto tag) {
        return launch_gemm<typename decltype(tag)::Shape, typename decltype(tag)::Format>(weight, plan, tokens, parts,
                                                                                          counters, stream);
    });
}

// gemm_w4a16_bf16.cu
int plan_gemm_w4a16_bf16(const GemmWeight& weight, int tokens, bool batch_invariant, int shares, int shared_limit,
                         GemmPlan* plan);
int gemm_w4a16_bf16(const GemmWeight& weight, const GemmPlan& plan, const GemmTokens& tokens, void* parts,
                    void* counters, void* stream);

} // namespace bitpalette
