// New tokens for the paged cache: centered, rotated, encoded, packed (quant/kv_token.py defines the format).
#pragma once

#include <cstdint>

#include "dtype.h"
#include "input_transform_ops.h"
#include "isa.h"

namespace bitpalette {

// Keys or values of one layer, [tokens, heads, width] by strides in elements; widths are contiguous.
struct KvTokens {
    const void* x;
    Dtype dtype;
    int64_t token_stride, head_stride;
    int64_t tokens, heads, width; // width: a multiple of 8
    const float* mean;            // [heads, width], subtracted first; null: none
    bool rotate;                  // false: x is rotated already
};

struct KvPages {
    uint8_t* codes; // [pages, heads, 64, width * bits / 8]
    uint16_t* gain; // [pages, heads, 64], fp16
    int64_t pages;
    int bits;             // 2, 3, 4 or 8
    bool unbiased;        // the gain of keys, else of values
    const int64_t* slots; // [tokens], page * 64 + token of the page
};

// Hartley part of a rotation of p * width elements.
struct KvRotation {
    const float* matrix; // [p, p]; null: p = 1
    int64_t p, width;
    float unit; // 1 / sqrt(width)
    const TransformOps* ops;
};

struct KvAppendUnit {
    // z [width] = R (x - mean), of token `token` and head `head`. z, room: [width in steps of 16].
    void (*load)(const KvTokens& x, const KvRotation& rotation, int64_t token, int64_t head, float* z, float* room);
    // Codes of z [width], of `bits` bits with this step, to a row of packed codes. codes: room, [width].
    void (*encode)(const float* z, int64_t width, int bits, bool unbiased, float step, uint8_t* codes, uint8_t* packed,
                   uint16_t* gain);
};

// The same bits whatever the number of tokens, threads and the instruction set (but for odd factors of width that are
// above 1024: std::invalid_argument, as for slots outside of the pages).
void append_tokens(Isa isa, const KvTokens& tokens, const KvPages& to, int threads);

// z [tokens, heads, width] of dtype = R (x - mean), for tokens that stay in 16 bits; z is contiguous.
void rotate_tokens(Isa isa, const KvTokens& tokens, Dtype dtype, void* z, int threads);

extern const KvAppendUnit kv_append_scalar;
#if BITPALETTE_X86
extern const KvAppendUnit kv_append_avx2;
extern const KvAppendUnit kv_append_avx512;
#endif
#if BITPALETTE_AARCH64
extern const KvAppendUnit kv_append_neon;
#endif

} // namespace bitpalette
