#include "gemm_launch.cuh"
#include "gemm_w4a8.cuh"

namespace bitpalette {

namespace {

template <class Act, class Do>
int with_format8(const GemmWeight& weight, int shape, Do&& act) {
    const bool grouped = weight.weight.group_size != 0 && weight.weight.group_size < weight.weight.k;
    switch (weight.weight.format) {
    case Format::int4:
        return grouped ? with_shape<GroupedA8<Act>>(shape, act) : with_shape<ChannelA8<Act, 4>>(shape, act);
    case Format::int8:
        return grouped ? cannot_launch : with_shape<ChannelA8<Act, 8>>(shape, act);
    case Format::progressive:
        return with_shape<ProgressiveA8<Act>>(shape, act);
    default:
        return cannot_launch;
    }
}

template <class Do>
int with_kernel8(const GemmWeight& weight, int shape, Do&& act) {
    return weight.type == Dtype::bf16 ? with_format8<BFloat>(weight, shape, act)
                                      : with_format8<Half>(weight, shape, act);
}

} // namespace

int plan_gemm_w4a8(const GemmWeight& weight, int tokens, bool batch_invariant, int shares, int shared_limit,
                   GemmPlan* plan) {
    plan->shape = shape_for(tokens, batch_invariant);
    return with_kernel8(weight, plan->shape, [&](auto tag) {
        return plan_gemm<typename decltype(tag)::Shape, typename decltype(tag)::Format>(weight, tokens, batch_invariant,
                                                                                        shares, shared_limit, plan);
    });
}

int gemm_w4a8(const GemmWeight& weight, const GemmPlan& plan, const GemmTokens& tokens, void* parts, void* counters,
              void* stream) {
    return with_kernel8(weight, plan.shape, [&](auto tag) {
        return launch_gemm<typename decltype(tag)::Shape, typename decltype(tag)::Format>(weight, plan, tokens, parts,
                                                                                          counters, stream);
    });
}

} // namespace bitpalette
