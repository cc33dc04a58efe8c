#include "container_entry.h"
#include "gemv_i8.cuh"

static int64_t counter_bytes(int64_t n) {
    return (4 * bitpalette::gemv_i8_counters(n) + 15) / 16 * 16;
}

extern "C" int run_gemv_i8(const uint32_t* codes, const uint16_t* scale, int64_t n, int64_t k, int row_bits, int window,
                           const int8_t* x, const int8_t* x_low, const float* x_scale, const int32_t* x_sum,
                           const void* bias, void* y, int64_t y_stride, int tokens, int dtype, int blocks,
                           void* workspace) {
    bitpalette::GemvI8Args args{};
    args.weight.format = bitpalette::Format::trellis;
    args.weight.codes = codes;
    args.weight.scale = scale;
    args.weight.n = n;
    args.weight.k = k;
    args.weight.row_bits = row_bits;
    args.weight.window = window;
    args.x = x;
    args.x_low = x_low;
    args.x_scale = x_scale;
    args.x_sum = x_sum;
    args.bias = bias;
    args.y = y;
    args.y_stride = y_stride;
    args.tokens = tokens;
    args.dtype = static_cast<bitpalette::Dtype>(dtype);
    args.blocks = blocks;
    // counters first, then the sums
    args.counters = static_cast<unsigned*>(workspace);
    args.sums = reinterpret_cast<int64_t*>(static_cast<char*>(workspace) + counter_bytes(n));
    return bitpalette::call_launcher(bitpalette::gemv_i8, args);
}

extern "C" int workspace_bytes(int64_t n, int tokens, int blocks, int64_t* bytes) {
    *bytes = counter_bytes(n) + 8 * bitpalette::gemv_i8_sums(tokens, blocks);
    return 0;
}
