// Keys and values of the positions that a decoder has seen, [layer][kv head][position][row].
#pragma once

#include <cstdint>
#include <memory>

#include "dtype.h"

namespace bitpalette {

constexpr int64_t kv_lanes = 16; // rows are whole registers of every instruction set, zero from head_dim on

class KvCache {
  public:
    // dtype: f32 or bf16. capacity: positions to make room for; it doubles where more come. std::invalid_argument for
    // sizes below 1 or another dtype.
    KvCache(int64_t layers, int64_t kv_heads, int64_t head_dim, Dtype dtype, int64_t capacity);

    // Room for positions 0..positions-1; what is there stays. std::bad_alloc leaves it as it was.
    void reserve(int64_t positions);

    // Rounded to the cache's type. key, value [head_dim].
    void put(int64_t layer, int64_t kv_head, int64_t position, const float* key, const float* value);

    // A layer's rows: those of kv head h begin `h * capacity() * row()` elements on.
    const void* keys(int64_t layer) const { return at(keys_.get(), layer, 0); }
    const void* values(int64_t layer) const { return at(values_.get(), layer, 0); }

    Dtype dtype() const { return dtype_; }
    int64_t capacity() const { return capacity_; }
    int64_t row() const { return row_; }
    int64_t row_bytes() const { return row_ * (dtype_ == Dtype::f32 ? 4 : 2); }

  private:
    struct Free {
        void operator()(unsigned char* p) const;
    };
    using Bytes = std::unique_ptr<unsigned char, Free>;

    Bytes room(int64_t positions) const;
    unsigned char* at(unsigned char* from, int64_t layer, int64_t kv_head) const {
        return from + (layer * kv_heads_ + kv_head) * capacity_ * row_bytes();
    }

    int64_t layers_, kv_heads_, head_dim_, row_, capacity_;
    Dtype dtype_;
    Bytes keys_, values_;
};

} // namespace bitpalette
