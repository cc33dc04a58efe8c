// The body of attention_decode_*.cpp over the float lanes V.
#pragma once

#include "attention_decode.h"
#include "float_lanes.h"

namespace bitpalette {
namespace {

// score[p] = q . key[p] * scale for n positions
template <class V, class T>
inline void scores_of(const float* q, const T* keys, int64_t row, int64_t n, float scale, float* score) {
    int64_t p = 0;
    for (; p + 4 <= n; p += 4) {
        typename V::Floats sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
        for (int64_t i = 0; i < row; i += V::lanes) {
            const typename V::Floats query = V::load(q + i);
            for (int j = 0; j < 4; ++j)
                sums[j] = V::multiply_add(query, V::load(keys + (p + j) * row + i), sums[j]);
        }
        for (int j = 0; j < 4; ++j)
            score[p + j] = V::total(sums[j]) * scale;
    }
    for (; p < n; ++p) {
        typename V::Floats sum = V::zero();
        for (int64_t i = 0; i < row; i += V::lanes)
            sum = V::multiply_add(V::load(q + i), V::load(keys + p * row + i), sum);
        score[p] = V::total(sum) * scale;
    }
}

// sum[i] = sum[i] * keep + weight[p] * value[p][i] over n positions, for W registers of i
template <class V, class T, int W>
inline void add_values(const float* weight, const T* values, int64_t row, int64_t n, float keep, float* sum) {
    typename V::Floats sums[W];
    for (int w = 0; w < W; ++w)
        sums[w] = V::multiply(V::load(sum + w * V::lanes), V::all(keep));
    for (int64_t p = 0; p < n; ++p) {
        const typename V::Floats by = V::all(weight[p]);
        for (int w = 0; w < W; ++w)
            sums[w] = V::multiply_add(by, V::load(values + p * row + w * V::lanes), sums[w]);
    }
    for (int w = 0; w < W; ++w)
        V::store(sum + w * V::lanes, sums[w]);
}

// One query with the n positions of a tile. state: the largest score so far and the total weight relative to it.
template <class V, class T>
inline void attend_tile(const float* q, const T* keys, const T* values, int64_t row, int64_t n, float scale,
                        float* state, float* sum) {
    alignas(64) float weight[attention_tile];
    scores_of<V>(q, keys, row, n, scale, weight);
    for (int64_t p = n; p < attention_tile; ++p)
        weight[p] = -__builtin_inff();
    typename V::Floats most = V::all(state[0]);
    for (int64_t p = 0; p < attention_tile; p += V::lanes)
        most = V::maximum(most, V::load(weight + p));
    const float largest = V::largest(most);
    alignas(64) float change[V::lanes];
    V::store(change, exponential<V>(V::all(state[0] - largest)));
    for (int64_t p = 0; p < attention_tile; p += V::lanes)
        V::store(weight + p, exponential<V>(V::subtract(V::load(weight + p), V::all(largest))));
    float total = 0;
    for (int64_t p = 0; p < n; ++p)
        total += weight[p];
    state[0] = largest;
    state[1] = state[1] * change[0] + total;
    int64_t i = 0;
    for (; i + 4 * V::lanes <= row; i += 4 * V::lanes)
        add_values<V, T, 4>(weight, values + i, row, n, change[0], sum + i);
    for (; i < row; i += V::lanes)
        add_values<V, T, 1>(weight, values + i, row, n, change[0], sum + i);
}

// Heads begin..end-1, which share one kv head.
template <class V, class T>
void attend_group(const AttentionCall& c, int64_t kv_head, int64_t begin, int64_t end) {
    const int64_t row = c.row;
    const T* keys = static_cast<const T*>(c.keys) + kv_head * c.stride;
    const T* values = static_cast<const T*>(c.values) + kv_head * c.stride;
    const auto oldest = [&c](int64_t t) {
        const int64_t from = c.first + t + 1 - c.window;
        return c.window > 0 && from > 0 ? from : 0;
    };
    for (int64_t t = 0; t < c.tokens; ++t)
        for (int64_t h = begin; h < end; ++h) {
            const int64_t query = t * c.heads + h;
            c.softmax[2 * query] = -__builtin_inff();
            c.softmax[2 * query + 1] = 0;
            std::memset(c.sums + query * row, 0, static_cast<size_t>(row) * sizeof(float));
        }
    const int64_t stop = c.first + c.tokens;
    for (int64_t tile = oldest(0); tile < stop; tile += attention_tile)
        for (int64_t t = 0; t < c.tokens; ++t) {
            const int64_t from = tile > oldest(t) ? tile : oldest(t), seen = c.first + t + 1;
            const int64_t to = tile + attention_tile < seen ? tile + attention_tile : seen;
            if (from >= to)
                continue;
            for (int64_t h = begin; h < end; ++h) {
                const int64_t query = t * c.heads + h;
                attend_tile<V>(c.q + query * row, keys + from * row, values + from * row, row, to - from, c.scale,
                               c.softmax + 2 * query, c.sums + query * row);
            }
        }
    for (int64_t t = 0; t < c.tokens; ++t)
        for (int64_t h = begin; h < end; ++h) {
            const int64_t query = t * c.heads + h;
            const float share = 1 / c.softmax[2 * query + 1];
            for (int64_t i = 0; i < c.head_dim; ++i)
                c.out[query * c.head_dim + i] = c.sums[query * row + i] * share;
        }
}

template <class V>
void attend_heads(const AttentionCall& c, int64_t begin, int64_t end) {
    const int64_t queries = c.heads / c.kv_heads; // of a kv head
    while (begin < end) {
        const int64_t kv_head = begin / queries, last = (kv_head + 1) * queries;
        const int64_t to = last < end ? last : end;
        if (c.dtype == Dtype::f32)
            attend_group<V, float>(c, kv_head, begin, to);
        else
            attend_group<V, Bf16>(c, kv_head, begin, to);
        begin = to;
    }
}

template <class V>
constexpr AttentionUnit attention_unit{attend_heads<V>};

} // namespace
} // namespace bitpalette
