#include "gemm_w4a16_launch.cuh"

namespace bitpalette {

int plan_gemm_w4a16_bf16(const GemmWeight& weight, int tokens, bool batch_invariant, int shares, int shared_limit,
                         GemmPlan* plan) {
    return plan16<BFloat>(weight, tokens, batch_invariant, shares, shared_limit, plan);
}

int gemm_w4a16_bf16(const GemmWeight& weight, const GemmPlan& plan, const GemmTokens& tokens, void* parts,
                    void* counters, void* stream) {
    return launch16<BFloat>(weight, plan, tokens, parts, counters, stream);
}

} // namespace bitpalette
