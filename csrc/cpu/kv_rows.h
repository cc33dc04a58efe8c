// The cache of one layer for the rows of a batch: storing new tokens, appending them and attention over all parts.
//
// kernels/kv_rows.py tells of the parts: sinks and a ring in 16 bits, pages of codes between them. Everything a call
// needs of them is behind pointers that stay the same from token to token.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace bitpalette {

struct KvRowsSide {
    void *sinks, *ring; // [batch, most_sinks or capacity, heads, width], rotated (and keys centered)
    uint8_t* codes;     // [pages, heads, 64, width * bits / 8]
    uint16_t* gain;     // [pages, heads, 64], fp16
    int bits;
    int64_t width;
};

struct KvRows {
    int64_t batch, heads, most_sinks, most_window, capacity, pages;
    Dtype dtype;                // of tokens in 16 bits
    const int32_t* block_table; // [batch, table_row]
    int64_t table_row;
    int64_t *length, *quantized, *exact_from; // [batch]: the state of kernels/kv_rows.py
    const int64_t* claimed;                   // [batch]: tokens before this one have pages of their own
    const float* mean;                        // [heads, keys.width]; null: keys are not centered
    KvRowsSide keys, values;
};

// New tokens of keys or values by strides in elements; widths are contiguous.
struct KvNew {
    const void* x;
    int64_t batch_stride, token_stride, head_stride;
};

// k, v in the dtype of the rows -> stored_k, stored_v [batch, tokens, heads, width]: centered and rotated.
void store_tokens(Isa isa, const KvRows& rows, const KvNew& k, const KvNew& v, int64_t tokens, void* stored_k,
                  void* stored_v, int threads);

// Stored tokens, less the first skip[b] of a row (null: none): what leaves the window is encoded, the new ones go to
// sinks and ring, the state goes on. False where a row has no pages for it; nothing is done then.
bool append_tokens_to_rows(Isa isa, const KvRows& rows, const KvNew& k, const KvNew& v, int64_t tokens,
                           const int64_t* skip, int threads);

struct KvRowsQuery {
    const void* q; // [batch, heads * group, tokens, keys.width] by strides in elements
    Dtype dtype;
    int64_t batch_stride, head_stride, token_stride;
    int64_t group, tokens;
    float scale, softcap;
    int64_t sliding_window;
    const float* sink_logits;
    bool exact;
    void* out; // [batch, tokens, heads * group, values.width] of the dtype of q, contiguous, in the model's own basis
};

// Attention of queries that are not rotated over the rows and, unless k.x is null, stored tokens not yet appended.
void attend_rows(Isa isa, const KvRows& rows, const KvRowsQuery& query, const KvNew& k, const KvNew& v,
                 const int64_t* skip, int threads);

} // namespace bitpalette
