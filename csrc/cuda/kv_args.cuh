// What attention over the packed KV cache is given, and what a query sees of it.
#pragma once

#include "../cpu/dtype.h"
#include "kv_rotate.cuh"

namespace bitpalette {

constexpr int kv_page = 64;         // tokens
constexpr int kv_most_tokens = 16;  // new tokens of a call
constexpr int kv_most_warps = 4;    // of a block
constexpr int kv_step = 32;         // tokens that a warp takes at once: half a page
constexpr int kv_most_splits = 256; // of a row and kv head

// Tokens that are not quantized, [batch, slots, kv_heads, width] by strides in elements; widths are contiguous, rows
// aligned to 16 bytes.
struct KvDense {
    const void *keys, *values;
    int64_t key_batch, key_token, key_head;
    int64_t value_batch, value_token, value_head;
    const int32_t* lengths; // [batch], tokens; null: there are none
    const int32_t* first;   // [batch], slot of the first; null: 0. After the last slot comes slot 0.
    int slots;
};

// Positions of a row of the batch: sinks, then pages, then window, then fresh tokens. The queries are those of the last
// `tokens` positions; where a row has fewer, its first queries are padding and see nothing. All int32 arrays are read
// on the device. Nobody checks there that lengths fit: tokens beyond the slots or the table are never given.
struct KvAttentionArgs {
    const uint8_t *k_codes, *v_codes; // [pages, kv_heads, 64, width * bits / 8], aligned to 16
    const uint16_t *k_gain, *v_gain;  // [pages, kv_heads, 64], fp16, aligned to 16
    int bits_k, bits_v;               // 2, 3, 4 or 8
    const int32_t* block_table;       // [batch, table_row]
    int table_row;
    const int32_t* lengths; // [batch], tokens in pages
    KvDense dense[3];       // sinks, window, fresh
    Dtype dense_dtype;
    const int32_t* start;               // [batch], the first position that is seen (left padding); null: 0
    int batch, kv_heads, group, tokens; // group: query heads of a kv head; tokens: new ones
    int head_dim, head_dim_v;           // multiples of 16, at most kv_most_width
    float scale;                        // of q . k
    float softcap;                      // scores become softcap * tanh(score / softcap); 0: none
    int sliding_window;                 // positions that a token sees, its own among them; 0: all
    const float* sink_logits;           // [kv_heads * group], a term more of each denominator; null: none
    const void* q;                      // [batch, kv_heads * group, tokens, head_dim]
    Dtype q_dtype;
    bool rotate_q, rotate_out; // false: q comes rotated, the result leaves rotated
    KvRotation rotation_q, rotation_out;
    void* out; // [batch, kv_heads * group, tokens, head_dim_v]; zeros where a token sees nothing
    Dtype out_dtype;

    // How the work is split: by capacities, never by lengths, so that a captured launch stays right. Of a row and kv
    // head, splits 0..dense_splits-1 are tokens in 16 bits, the others pages.
    int splits, dense_splits;
    float* parts; // [batch, kv_heads, splits, group * tokens, head_dim_v + 2], kv_parts_floats of them
};

BP_HOST_DEVICE constexpr int64_t kv_parts_floats(int batch, int kv_heads, int rows, int width, int splits) {
    return static_cast<int64_t>(batch) * kv_heads * splits * rows * (width + 2);
}

// Of a row of the batch, in tokens.
struct KvSpan {
    int dense[3], pages; // of sinks, window, fresh
    int start, first_new;

    BP_DEVICE KvSpan(const KvAttentionArgs& args, int row) {
        BP_UNROLL
        for (int i = 0; i < 3; ++i)
            dense[i] = args.dense[i].lengths == nullptr ? 0 : args.dense[i].lengths[row];
        pages = args.lengths[row];
        start = args.start == nullptr ? 0 : args.start[row];
        first_new = dense[0] + pages + dense[1] + dense[2] - args.tokens;
    }
    BP_DEVICE int dense_tokens() const { return dense[0] + dense[1] + dense[2]; }
    // Position of token i of those in 16 bits.
    BP_DEVICE int dense_position(int i) const { return i < dense[0] ? i : i + pages; }
    // The first position that new token `token` sees; the last is its own.
    BP_DEVICE int first_seen(int token, int sliding_window) const {
        const int oldest = sliding_window > 0 ? first_new + token + 1 - sliding_window : 0;
        return oldest > start ? oldest : start;
    }
};

} // namespace bitpalette
