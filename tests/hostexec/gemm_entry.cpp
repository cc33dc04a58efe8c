// One format of the GEMMs with all of its shapes: -DGEMM_FORMAT='W4A16<IntFragment<Half, 4>>'.
#include "gemm_launch.cuh"
#include "gemm_w4a16.cuh"
#include "gemm_w4a8.cuh"

namespace bitpalette {

// sizes: rows, columns, group, row_bits, window, format, tokens, tokens of the plan, batch_invariant, shares,
// shared_limit, x_stride, x_bytes, y_stride
static GemmWeight weight_of(const int64_t* sizes) {
    GemmWeight weight = {};
    weight.rows = int(sizes[0]);
    weight.columns = int(sizes[1]);
    weight.group = int(sizes[2]);
    weight.row_bits = int(sizes[3]);
    weight.window = int(sizes[4]);
    weight.format = static_cast<CodeFormat>(sizes[5]);
    return weight;
}

static int plan(const GemmWeight& weight, const int64_t* sizes, GemmPlan* plan) {
    plan->shape = shape_for(int(sizes[7]), sizes[8] != 0);
    return with_shape<GEMM_FORMAT>(plan->shape, [&](auto tag) {
        return plan_gemm<typename decltype(tag)::Shape, typename decltype(tag)::Format>(
            weight, int(sizes[7]), sizes[8] != 0, int(sizes[9]), int(sizes[10]), plan);
    });
}

extern "C" int gemm_plan(const int64_t* sizes, int has_zero, int64_t* out) {
    GemmWeight weight = weight_of(sizes);
    weight.zero_point = weight.offset = has_zero ? sizes : nullptr; // only whether it is there counts
    GemmPlan made = {};
    const int error = plan(weight, sizes, &made);
    const int64_t values[] = {made.part_words, made.counters, made.shares, made.stages, made.shape, made.shared_bytes};
    for (int i = 0; i < 6; ++i)
        out[i] = values[i];
    return error;
}

extern "C" int gemm_run(const int64_t* sizes, const void* codes, const void* scale, const void* zero_point,
                        const void* group_scale, const void* offset, const void* table, const void* bias, const void* x,
                        const float* token_scale, const int32_t* token_sum, void* y, void* parts, void* counters) {
    GemmWeight weight = weight_of(sizes);
    weight.codes = codes;
    weight.scale = scale;
    weight.zero_point = zero_point;
    weight.group_scale = group_scale;
    weight.offset = offset;
    weight.table = table;
    weight.bias = bias;
    GemmPlan made = {};
    if (const int error = plan(weight, sizes, &made))
        return error;
    const GemmTokens tokens = {x, sizes[11], int(sizes[12]), token_scale, token_sum, int(sizes[6]), y, sizes[13]};
    return with_shape<GEMM_FORMAT>(made.shape, [&](auto tag) {
        return launch_gemm<typename decltype(tag)::Shape, typename decltype(tag)::Format>(weight, made, tokens, parts,
                                                                                          counters, nullptr);
    });
}

} // namespace bitpalette
