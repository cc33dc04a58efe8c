#include "kv_cache.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "half.h"

namespace bitpalette {
namespace {

constexpr std::align_val_t cache_line{64};

} // namespace

void KvCache::Free::operator()(unsigned char* p) const {
    ::operator delete(p, cache_line);
}

KvCache::KvCache(int64_t layers, int64_t kv_heads, int64_t head_dim, Dtype dtype, int64_t capacity)
    : layers_(layers), kv_heads_(kv_heads), head_dim_(head_dim), row_((head_dim + kv_lanes - 1) / kv_lanes * kv_lanes),
      capacity_(capacity), dtype_(dtype) {
    if (layers < 1 || kv_heads < 1 || head_dim < 1 || capacity < 1)
        throw std::invalid_argument("a cache of " + std::to_string(layers) + " layers, " + std::to_string(kv_heads) +
                                    " heads of " + std::to_string(head_dim) + ", " + std::to_string(capacity) +
                                    " positions");
    if (dtype == Dtype::f16)
        throw std::invalid_argument("a cache is of float32 or bfloat16, not of float16");
    keys_ = room(capacity);
    values_ = room(capacity);
}

// Pages that no position has touched yet take no memory: nothing is written here.
KvCache::Bytes KvCache::room(int64_t positions) const {
    const int64_t bytes = layers_ * kv_heads_ * positions * row_bytes();
    return Bytes(static_cast<unsigned char*>(::operator new(static_cast<size_t>(bytes), cache_line)));
}

void KvCache::reserve(int64_t positions) {
    if (positions <= capacity_)
        return;
    const int64_t more = std::max(positions, 2 * capacity_);
    Bytes keys = room(more), values = room(more);
    const int64_t old_bytes = capacity_ * row_bytes(), new_bytes = more * row_bytes();
    for (int64_t i = 0; i < layers_ * kv_heads_; ++i) {
        std::memcpy(keys.get() + i * new_bytes, keys_.get() + i * old_bytes, static_cast<size_t>(old_bytes));
        std::memcpy(values.get() + i * new_bytes, values_.get() + i * old_bytes, static_cast<size_t>(old_bytes));
    }
    keys_ = std::move(keys), values_ = std::move(values), capacity_ = more;
}

void KvCache::put(int64_t layer, int64_t kv_head, int64_t position, const float* key, const float* value) {
    const auto write = [&](unsigned char* to, const float* from) {
        to += position * row_bytes();
        std::memset(to, 0, static_cast<size_t>(row_bytes()));
        for (int64_t i = 0; i < head_dim_; ++i)
            store_element(to, dtype_, i, from[i]);
    };
    write(at(keys_.get(), layer, kv_head), key);
    write(at(values_.get(), layer, kv_head), value);
}

} // namespace bitpalette
