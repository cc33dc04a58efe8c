#include "container_entry.h"
#include "kv_append.cuh"

// numbers: dtype, token_stride, head_stride, tokens, heads, width, rotate, odd, log2, then pages, bits, unbiased
static bitpalette::KvAppendArgs args_of(const int64_t* n, const float* reals, const void* x, const float* mean,
                                        const float* matrix) {
    bitpalette::KvAppendArgs args{};
    bitpalette::KvTokens& t = args.from;
    t.x = x;
    t.mean = mean;
    t.dtype = static_cast<bitpalette::Dtype>(n[0]);
    t.token_stride = n[1];
    t.head_stride = n[2];
    t.tokens = n[3];
    t.heads = static_cast<int>(n[4]);
    t.width = static_cast<int>(n[5]);
    t.rotate = n[6] != 0;
    t.rotation = {matrix, static_cast<int>(n[7]), static_cast<int>(n[8]), reals[0]};
    args.pages = n[9];
    args.bits = static_cast<int>(n[10]);
    args.unbiased = n[11] != 0;
    args.step = reals[1];
    return args;
}

// reals: 1 / sqrt of the power of two, step
extern "C" int run_kv_append(const int64_t* numbers, const float* reals, const void* x, const float* mean,
                             const float* matrix, const int64_t* slots, uint8_t* codes, uint16_t* gain) {
    bitpalette::KvAppendArgs args = args_of(numbers, reals, x, mean, matrix);
    args.slots = slots;
    args.codes = codes;
    args.gain = gain;
    return bitpalette::call_launcher(bitpalette::kv_append, args);
}

extern "C" int run_kv_rotate(const int64_t* numbers, const float* reals, const void* x, const float* mean,
                             const float* matrix, void* z, int dtype) {
    const bitpalette::KvRotateArgs args = {args_of(numbers, reals, x, mean, matrix).from, z,
                                           static_cast<bitpalette::Dtype>(dtype)};
    return bitpalette::call_launcher(bitpalette::kv_rotate, args);
}
