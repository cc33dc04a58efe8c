// The body of attention_decode_*.cpp over the float lanes V.
#pragma once

#include "attention_decode.h"
#include "float_lanes.h"

namespace bitpalette {
namespace {

constexpr int64_t widest_row = 256; // of tiles that are widened: 32 KiB each of keys and values on the stack

// score[p] = q . key[p] * scale for n positions
template <class V, class T>
inline void scores_of(const float* q, const T* keys, int64_t row, int64_t n, float scale, float* score) {
    int64_t p = 0;
    for (; p + V::lanes <= n; p += V::lanes) {
        typename V::Floats sums[V::lanes];
        for (int j = 0; j < V::lanes; ++j)
            sums[j] = V::zero();
        for (int64_t i = 0; i < row; i += V::lanes) {
            const typename V::Floats query = V::load(q + i);
            for (int j = 0; j < V::lanes; ++j)
                sums[j] = V::multiply_add(query, V::load(keys + (p + j) * row + i), sums[j]);
        }
        V::store(score + p, V::multiply(V::totals(sums), V::all(scale)));
    }
    for (; p < n; ++p) {
        typename V::Floats sum = V::zero();
        for (int64_t i = 0; i < row; i += V::lanes)
            sum = V::multiply_add(V::load(q + i), V::load(keys + p * row + i), sum);
        score[p] = V::total(sum) * scale;
    }
}

// sum[i] = sum[i] * keep + weight[p] * value[p][i] over n positions, for W registers of i. Positions in turn go to two
// sums, which hides half the latency of the additions.
template <class V, class T, int W>
inline void add_values(const float* weight, const T* values, int64_t row, int64_t n, float keep, float* sum) {
    typename V::Floats sums[2][W];
    for (int w = 0; w < W; ++w) {
        sums[0][w] = V::multiply(V::load(sum + w * V::lanes), V::all(keep));
        sums[1][w] = V::zero();
    }
    int64_t p = 0;
    for (; p + 2 <= n; p += 2)
        for (int j = 0; j < 2; ++j)
            for (int w = 0; w < W; ++w)
                sums[j][w] =
                    V::multiply_add(V::all(weight[p + j]), V::load(values + (p + j) * row + w * V::lanes), sums[j][w]);
    for (int w = 0; w < W; ++w) {
        if (p < n)
            sums[0][w] = V::multiply_add(V::all(weight[p]), V::load(values + p * row + w * V::lanes), sums[0][w]);
        V::store(sum + w * V::lanes, V::add(sums[0][w], sums[1][w]));
    }
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
    typename V::Floats total = V::zero();
    for (int64_t p = 0; p < attention_tile; p += V::lanes) {
        const typename V::Floats w = exponential<V>(V::subtract(V::load(weight + p), V::all(largest)));
        V::store(weight + p, w);
        total = V::add(total, w); // positions that are not there add 2^-124, where the largest so far has 1
    }
    state[0] = largest;
    state[1] = state[1] * change[0] + V::total(total);
    int64_t i = 0;
    for (; i + 4 * V::lanes <= row; i += 4 * V::lanes)
        add_values<V, T, 4>(weight, values + i, row, n, change[0], sum + i);
    for (; i < row; i += V::lanes)
        add_values<V, T, 1>(weight, values + i, row, n, change[0], sum + i);
}

// Heads begin..end-1 of the tokens that see positions tile..tile + attention_tile - 1. keys, values: of position
// `tile`.
template <class V, class T>
inline void attend_queries(const AttentionCall& c, const T* keys, const T* values, int64_t tile, int64_t begin,
                           int64_t end) {
    for (int64_t t = 0; t < c.tokens; ++t) {
        const int64_t seen = c.first + t + 1, oldest = c.window > 0 && seen > c.window ? seen - c.window : 0;
        const int64_t from = tile > oldest ? tile : oldest;
        const int64_t to = tile + attention_tile < seen ? tile + attention_tile : seen;
        if (from >= to)
            continue;
        const int64_t skip = (from - tile) * c.row;
        for (int64_t h = begin; h < end; ++h) {
            const int64_t query = t * c.heads + h;
            attend_tile<V>(c.q + query * c.row, keys + skip, values + skip, c.row, to - from, c.scale,
                           c.softmax + 2 * query, c.sums + query * c.row);
        }
    }
}

// Heads begin..end-1, which share one kv head.
template <class V, class T>
void attend_group(const AttentionCall& c, int64_t kv_head, int64_t begin, int64_t end) {
    const int64_t row = c.row;
    const T* keys = static_cast<const T*>(c.keys) + kv_head * c.stride;
    const T* values = static_cast<const T*>(c.values) + kv_head * c.stride;
    for (int64_t t = 0; t < c.tokens; ++t)
        for (int64_t h = begin; h < end; ++h) {
            const int64_t query = t * c.heads + h;
            c.softmax[2 * query] = -__builtin_inff();
            c.softmax[2 * query + 1] = 0;
            std::memset(c.sums + query * row, 0, static_cast<size_t>(row) * sizeof(float));
        }
    const int64_t stop = c.first + c.tokens, start = c.window > 0 && c.first >= c.window ? c.first + 1 - c.window : 0;
    for (int64_t tile = start; tile < stop; tile += attention_tile) {
        const int64_t n = stop - tile < attention_tile ? stop - tile : attention_tile;
        if (sizeof(T) == sizeof(float) || row > widest_row) {
            attend_queries<V>(c, keys + tile * row, values + tile * row, tile, begin, end);
            continue;
        }
        // widened once, not for each query
        alignas(64) float wide_keys[attention_tile * widest_row], wide_values[attention_tile * widest_row];
        for (int64_t i = 0; i < n * row; i += V::lanes) {
            V::store(wide_keys + i, V::load(keys + tile * row + i));
            V::store(wide_values + i, V::load(values + tile * row + i));
        }
        attend_queries<V>(c, wide_keys, wide_values, tile, begin, end);
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
