// Attention of a few new tokens over a cache: memory-bound, so each key and value is read once for all the queries of
// its head.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace bitpalette {

constexpr int64_t attention_tile = 32; // positions; with head_dim 128 in float32, keys and values fill 32 KiB of L1d

// Of one layer. Token t is at position first + t and sees positions up to its own, the last `window` of them.
struct AttentionCall {
    const void* keys; // [kv_heads, stride / row, row], the new tokens among them; values likewise
    const void* values;
    Dtype dtype;                       // of keys and values: f32 or bf16
    int64_t stride;                    // elements from one kv head to the next
    int64_t row;                       // a multiple of kv_lanes
    int64_t heads, kv_heads, head_dim; // heads a multiple of kv_heads
    int64_t first, tokens;
    int64_t window; // 0: all positions
    float scale;    // of q . k
    const float* q; // [tokens, heads, row], zero from head_dim on
    float* sums;    // room: [tokens, heads, row]
    float* softmax; // room: [tokens, heads, 2], largest score and total weight
    float* out;     // [tokens, heads, head_dim]
};

struct AttentionUnit {
    // Heads begin..end-1 of all tokens, by online softmax (Milakov and Gimelshein, arXiv 1805.02867).
    void (*attend)(const AttentionCall& call, int64_t begin, int64_t end);
};

// All heads. std::invalid_argument for a missing instruction set.
void attend(Isa isa, const AttentionCall& call, int threads);

extern const AttentionUnit attention_scalar;
#if BITPALETTE_X86
extern const AttentionUnit attention_avx2;
extern const AttentionUnit attention_avx512;
#endif
#if BITPALETTE_AARCH64
extern const AttentionUnit attention_neon;
#endif

} // namespace bitpalette
