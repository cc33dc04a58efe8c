#include "gemm_w4a16_launch.cuh"

namespace bitpalette {

int plan_gemm_w4a16(const GemmWeight& weight, int tokens, bool batch_invariant, int shares, int shared_limit,
                    GemmPlan* plan) {
    if (weight.type == Dtype::bf16)
        return plan_gemm_w4a16_bf16(weight, tokens, batch_invariant, shares, shared_limit, plan);
    return plan16<Half>(weight, tokens, batch_invariant, shares, shared_limit, plan);
}

int gemm_w4a16(const GemmWeight& weight, const GemmPlan& plan, const GemmTokens& tokens, void* parts, void* counters,
               void* stream) {
    if (weight.type == Dtype::bf16)
        return gemm_w4a16_bf16(weight, plan, tokens, parts, counters, stream);
    return launch16<Half>(weight, plan, tokens, parts, counters, stream);
}

} // namespace bitpalette
