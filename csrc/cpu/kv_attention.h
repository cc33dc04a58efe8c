// Attention of a few new tokens over a paged cache of codes, with the tokens that are kept in 16 bits around it.
//
// A key or value of one token and head is D codes c of b bits and a gain: gain * (2 c - (2^b - 1)) for each element, in
// a rotated basis (quant/kv_token.py). Queries come rotated, outputs leave rotated, and the tokens in 16 bits are
// rotated (and their keys centered) as well: the kernel knows nothing of rotations.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace bitpalette {

constexpr int64_t kv_page = 64;        // tokens
constexpr int64_t kv_split_pages = 32; // of a task: what a call does does not depend on the number of threads
constexpr int64_t kv_most_tokens = 16; // new tokens of a call

// Tokens that are not quantized, [batch, slots, kv_heads, width] by strides in elements; widths are contiguous.
struct KvDense {
    const void *keys, *values;
    int64_t key_batch, key_token, key_head;
    int64_t value_batch, value_token, value_head;
    const int32_t* lengths; // [batch], tokens; null: there are none
    const int32_t* first;   // [batch], slot of the first; null: 0. After the last slot comes slot 0.
    int64_t slots;
};

// Positions of a row of the batch: sinks, then pages, then window, then fresh tokens. The queries are those of the last
// `tokens` positions; where a row has fewer, its first queries are padding and see nothing.
struct KvAttentionCall {
    const uint8_t *k_codes, *v_codes; // [pages, kv_heads, 64, width * bits / 8]
    const uint16_t *k_gain, *v_gain;  // [pages, kv_heads, 64], fp16
    int bits_k, bits_v;               // 2, 3, 4 or 8
    const int32_t* block_table;       // [batch, table_row]
    int64_t table_row;
    const int32_t* lengths; // [batch], tokens in pages
    KvDense sinks, window, fresh;
    Dtype dense_dtype;
    const int32_t* start;                   // [batch], the first position that is seen (left padding); null: 0
    int64_t batch, kv_heads, group, tokens; // group: query heads of a kv head; tokens: new ones
    int64_t head_dim, head_dim_v;           // multiples of 8
    float scale;                            // of q . k
    float softcap;                          // scores become softcap * tanh(score / softcap); 0: none
    int64_t sliding_window;                 // positions that a token sees, its own among them; 0: all
    const float* sink_logits;               // [kv_heads * group], a term more of each denominator; null: none
    bool exact;                             // queries in 16 bits instead of 8: twice the products of scores
    const void* q;                          // [batch, kv_heads * group, tokens, head_dim]
    Dtype q_dtype;
    void* out; // [batch, kv_heads * group, tokens, head_dim_v]; zeros where a token sees nothing
    Dtype out_dtype;
};

// The queries of one kv head in the forms that units read; row r = head of the group * tokens + token.
struct KvQueries {
    const float* values; // [rows, value_row], zero from head_dim on
    int64_t value_row;   // a multiple of 16
    const int8_t* codes; // [rows, planes, 4 * quads], in the order of kv_key_element
    int64_t planes;      // 1, or 2: code + low / 254
    int64_t quads;
    const float* scale; // [rows] of codes, softmax scale included
    const float* sum;   // [rows] of codes
};

// Of one task and query: softmax relative to `most`, not divided by `weight`.
struct KvPartial {
    float* sums;   // [rows, head_dim_v]
    float* most;   // [rows], minus infinity where nothing is seen
    float* weight; // [rows]
};

struct KvAttentionUnit {
    // Bytes of room that both functions need, 64-byte aligned.
    int64_t (*room)(const KvAttentionCall& call);
    // Tokens first..last-1 of the pages of a row of the batch; first begins a page.
    void (*pages)(const KvAttentionCall& call, const KvQueries& queries, int64_t row, int64_t kv_head, int64_t first,
                  int64_t last, uint8_t* room, const KvPartial& to);
    // All that is not in pages.
    void (*dense)(const KvAttentionCall& call, const KvQueries& queries, int64_t row, int64_t kv_head, uint8_t* room,
                  const KvPartial& to);
};

constexpr int kv_codes_of_byte(int bits) {
    return bits == 3 ? 4 : 8 / bits; // of the low plane, for 3 bits
}
constexpr int64_t kv_row_bytes(int64_t width, int bits) {
    return width * bits / 8;
}
// Words of 4 bytes of a key's first plane; of 3 bits in pairs, of the even and of the odd bytes of eight.
constexpr int64_t kv_words(int64_t width, int bits) {
    return bits == 3 ? (width / 8 + 3) / 4 * 2 : (width / kv_codes_of_byte(bits) + 3) / 4;
}
// The element of a key that byte `byte` of quad (word * codes of a byte + s) is about; may be past the last.
constexpr int64_t kv_key_element(int64_t quad, int64_t byte, int bits) {
    const int64_t codes = kv_codes_of_byte(bits), word = quad / codes;
    return (bits == 3 ? 8 * (word / 2) + 2 * byte + word % 2 : 4 * word + byte) * codes + quad % codes;
}

// std::invalid_argument for sizes that cannot be, or a missing instruction set.
void attend_pages(Isa isa, const KvAttentionCall& call, int threads);

extern const KvAttentionUnit kv_attention_scalar;
#if BITPALETTE_X86
extern const KvAttentionUnit kv_attention_avx2;
extern const KvAttentionUnit kv_attention_avx512;
#endif
#if BITPALETTE_AVXVNNI
extern const KvAttentionUnit kv_attention_avxvnni;
#endif
#if BITPALETTE_AARCH64
extern const KvAttentionUnit kv_attention_neon;
#endif

} // namespace bitpalette
