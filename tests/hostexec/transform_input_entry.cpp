#include "container_entry.h"
#include "transform_input.cuh"

extern "C" int run_transform_input(const void* x, int64_t x_stride, int64_t tokens, int n, int dtype,
                                   const float* factors, const uint8_t* signs, int rotate, const float* hartley,
                                   const int32_t* order, int output, void* y, int8_t* low, float* scale, int32_t* sum,
                                   int64_t stride, float* workspace, int64_t shared_limit) {
    bitpalette::TransformInputArgs args{};
    args.x = x;
    args.x_stride = x_stride;
    args.tokens = tokens;
    args.n = n;
    args.dtype = static_cast<bitpalette::Dtype>(dtype);
    args.factors = factors;
    args.signs = signs;
    args.rotate = rotate != 0;
    args.hartley = hartley;
    args.order = order;
    args.output = static_cast<bitpalette::TransformOutput>(output);
    args.y = y;
    args.low = low;
    args.scale = scale;
    args.sum = sum;
    args.stride = stride;
    args.workspace = workspace;
    args.shared_limit = static_cast<size_t>(shared_limit);
    return bitpalette::call_launcher(bitpalette::transform_input, args);
}
