// One format of the GEMMs with all of its shapes: -DGEMM_FORMAT='W4A16<IntFragment<Half, 4>>'. With -DGEMM_ONE_SHAPE
// the first alone, which compiles in a quarter of the time.
#include "gemm_launch.cuh"
#include "gemm_w4a16.cuh"
#include "gemm_w4a8.cuh"

namespace bitpalette {

// sizes: rows, columns, group, row_bits, window, format, tokens, tokens of the plan, batch_invariant, shares,
// shared_limit, x_stride, x_bytes, y_stride
static GemmWeight weight_of(const int64_t* sizes) {
    GemmWeight weight = {};
    Container& w = weight.weight;
    w.n = sizes[0];
    w.k = sizes[1];
    w.group_size = int(sizes[2]);
    w.row_bits = int(sizes[3]);
    w.window = int(sizes[4]);
    w.format = static_cast<Format>(sizes[5]);
    return weight;
}

template <class Do>
static int with_compiled_shape(int shape, Do&& act) {
#ifdef GEMM_ONE_SHAPE
    return shape == 0 ? act(KernelTag<GemmShape<8, 2, 4>, GEMM_FORMAT>()) : cannot_launch;
#else
    return with_shape<GEMM_FORMAT>(shape, act);
#endif
}

static int plan(const GemmWeight& weight, const int64_t* sizes, GemmPlan* plan) {
    plan->shape = shape_for(int(sizes[7]), sizes[8] != 0);
    return with_compiled_shape(plan->shape, [&](auto tag) {
        return plan_gemm<typename decltype(tag)::Shape, typename decltype(tag)::Format>(
            weight, int(sizes[7]), sizes[8] != 0, int(sizes[9]), int(sizes[10]), plan);
    });
}

extern "C" int gemm_plan(const int64_t* sizes, int has_zero, int64_t* out) {
    GemmWeight weight = weight_of(sizes);
    // only whether they are there counts
    weight.weight.zero_point = weight.weight.group_offset =
        has_zero ? reinterpret_cast<const uint8_t*>(sizes) : nullptr;
    GemmPlan made = {};
    const int error = plan(weight, sizes, &made);
    const int64_t values[] = {made.part_words, made.counters, made.shares, made.stages, made.shape, made.shared_bytes};
    for (int i = 0; i < 6; ++i)
        out[i] = values[i];
    return error;
}

extern "C" int gemm_run(const int64_t* sizes, const uint32_t* codes, const uint16_t* scale, const uint8_t* zero_point,
                        const uint8_t* group_scale, const uint8_t* group_offset, const uint16_t* table,
                        const void* bias, const void* x, const float* token_scale, const int32_t* token_sum, void* y,
                        void* parts, void* counters) {
    GemmWeight weight = weight_of(sizes);
    Container& w = weight.weight;
    w.codes = codes;
    w.scale = scale;
    w.zero_point = zero_point;
    w.group_scale = group_scale;
    w.group_offset = group_offset;
    w.table = table;
    weight.bias = bias;
    GemmPlan made = {};
    if (const int error = plan(weight, sizes, &made))
        return error;
    const GemmTokens tokens = {x, sizes[11], int(sizes[12]), token_scale, token_sum, int(sizes[6]), y, sizes[13]};
    return with_compiled_shape(made.shape, [&](auto tag) {
        return launch_gemm<typename decltype(tag)::Shape, typename decltype(tag)::Format>(weight, made, tokens, parts,
                                                                                          counters, nullptr);
    });
}

} // namespace bitpalette
