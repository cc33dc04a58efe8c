// New tokens for the rows of a batch: what leaves the window goes to pages, the new ones to sinks and ring
// (kernels/kv_rows.py tells of the parts).
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace bitpalette {

// Keys or values. All 16-bit tokens are rotated, and those of keys centered.
struct KvRowsSide {
    const void* fresh;                // [batch, tokens, heads, width], the last two contiguous
    int64_t fresh_batch, fresh_token; // strides in elements
    void* sinks;                      // [batch, most_sinks, heads, width]
    void* ring;                       // [batch, capacity, heads, width]
    uint8_t* codes;                   // [pages, heads, 64, width * bits / 8]
    uint16_t* gain;                   // [pages, heads, 64], fp16
    int bits;
    int64_t width;
};

struct KvRowsCall {
    KvRowsSide keys, values;
    Dtype dtype; // of all 16-bit tokens
    int64_t batch, heads, most_sinks, capacity, pages;
    const int64_t *skip, *length;     // [batch]: padding among the new tokens; tokens before them
    const int64_t* length_after;      // [batch]
    const int64_t *quantized, *until; // [batch]: tokens quantized..until-1 go to pages now
    const int32_t* block_table;       // [batch, table_row]
    int64_t table_row;
};

// std::invalid_argument for a token whose page is not among the pages.
void append_rows(Isa isa, const KvRowsCall& call, int threads);

} // namespace bitpalette
