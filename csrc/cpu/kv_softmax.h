// What a query sees of a cache, the softmax of a block of positions, and tokens that are not quantized; over V.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "float_lanes.h"
#include "kv_attention.h"
#include "kv_products.h"

namespace bitpalette {
namespace {

// body(std::integral_constant<int, bits>)
template <class F>
inline void with_bits(int bits, F&& body) {
    if (bits == 2)
        body(std::integral_constant<int, 2>{});
    else if (bits == 3)
        body(std::integral_constant<int, 3>{});
    else if (bits == 4)
        body(std::integral_constant<int, 4>{});
    else
        body(std::integral_constant<int, 8>{});
}

// Of a row of the batch, in tokens.
struct KvSpan {
    int64_t sinks, pages, window, fresh, total;
    int64_t start, sliding_window, first_new;
};

inline KvSpan kv_span(const KvAttentionCall& c, int64_t row) {
    KvSpan s{};
    s.sinks = c.sinks.lengths == nullptr ? 0 : c.sinks.lengths[row];
    s.window = c.window.lengths == nullptr ? 0 : c.window.lengths[row];
    s.pages = c.lengths == nullptr ? 0 : c.lengths[row];
    s.fresh = c.fresh.lengths == nullptr ? 0 : c.fresh.lengths[row];
    s.total = s.sinks + s.pages + s.window + s.fresh;
    s.start = c.start == nullptr ? 0 : c.start[row];
    s.sliding_window = c.sliding_window;
    s.first_new = s.total - c.tokens;
    return s;
}

struct KvRange {
    int64_t from, to;
};

// Positions that new token `token` sees.
inline KvRange seen_positions(const KvSpan& s, int64_t token) {
    const int64_t position = s.first_new + token, oldest = s.sliding_window > 0 ? position + 1 - s.sliding_window : 0;
    return {oldest > s.start ? oldest : s.start, position + 1};
}

// The same among positions base..base+n-1, relative to base.
inline KvRange seen_range(const KvSpan& s, int64_t token, int64_t base, int64_t n) {
    KvRange range = seen_positions(s, token);
    range.from = range.from > base ? range.from - base : 0;
    range.to = range.to - base < n ? range.to - base : n;
    return range;
}

inline void clear_partial(int64_t rows, const KvPartial& to) {
    for (int64_t r = 0; r < rows; ++r) {
        to.most[r] = -__builtin_inff();
        to.weight[r] = 0;
    }
}

// Softcap, and minus infinity outside of the range; returns the largest of `most` and all scores, lane by lane.
template <class V>
inline typename V::Floats limit_scores(float* score, KvRange range, float softcap, float most) {
    if (softcap > 0)
        for (int64_t t = 0; t < kv_page; t += V::lanes) {
            // tanh x = 1 - 2 / (e^2x + 1)
            const auto e = exponential<V>(V::multiply(V::load(score + t), V::all(2 / softcap)));
            const auto fraction = V::divide(V::all(2.0f), V::add(e, V::all(1.0f)));
            V::store(score + t, V::multiply(V::subtract(V::all(1.0f), fraction), V::all(softcap)));
        }
    for (int64_t t = 0; t < range.from; ++t)
        score[t] = -__builtin_inff();
    for (int64_t t = range.to; t < kv_page; ++t)
        score[t] = -__builtin_inff();
    typename V::Floats largest = V::all(most);
    for (int64_t t = 0; t < kv_page; t += V::lanes)
        largest = V::maximum(largest, V::load(score + t));
    return largest;
}

// chance = e^(score - most) with the new `most`; returns the factor of what came before. Scores outside of the range,
// which is not empty, are lost.
template <class V>
inline float softmax_block(float* score, KvRange range, float softcap, float* chance, float* most, float* weight) {
    const typename V::Floats largest = limit_scores<V>(score, range, softcap, *most);
    const float now = V::largest(largest);
    alignas(64) float keep[V::lanes];
    V::store(keep, exponential<V>(V::all(*most - now)));
    typename V::Floats total = V::zero();
    for (int64_t t = 0; t < kv_page; t += V::lanes) {
        const auto e = exponential<V>(V::subtract(V::load(score + t), V::all(now)));
        V::store(chance + t, e);
        total = V::add(total, e); // positions that are not seen add 2^-124, where the largest so far has 1
    }
    *most = now;
    *weight = *weight * keep[0] + V::total(total);
    return keep[0];
}

// scores [4, 64]: of R queries with n keys
template <class V, class T, int R>
inline void dense_scores(const float* q, int64_t q_row, const T* keys, int64_t stride, int64_t width, int64_t n,
                         float scale, float* score) {
    for (int64_t t = 0; t < n; ++t) {
        typename V::Floats sum[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
            sum[r] = V::zero();
        for (int64_t i = 0; i < width; i += V::lanes) {
            const T* from = keys + t * stride + i;
            const bool whole = i + V::lanes <= width;
            const auto key = whole ? V::load(from) : V::load(from, static_cast<int>(width - i));
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r)
                sum[r] = V::multiply_add(V::load(q + r * q_row + i), key, sum[r]);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
            score[r * kv_page + t] = V::total(sum[r]) * scale;
    }
}

// sums [R, width] = sums * keep + chances [R, 64] values, for tokens from..to-1 and `n` columns, C registers
template <class V, class T, int R, int C>
inline void dense_columns(const float* chance, const float* keep, const T* values, int64_t stride, int64_t width,
                          int64_t from, int64_t to, int n, float* sums) {
    const bool whole = n >= C * V::lanes;
    typename V::Floats sum[R][C];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            const float* at = sums + r * width + c * V::lanes;
            sum[r][c] = V::multiply(whole ? V::load(at) : V::load(at, n), V::all(keep[r]));
        }
    for (int64_t t = from; t < to; ++t) {
        typename V::Floats value[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            const T* at = values + t * stride + c * V::lanes;
            value[c] = whole ? V::load(at) : V::load(at, n);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const auto weight = V::all(chance[r * kv_page + t]);
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c)
                sum[r][c] = V::multiply_add(weight, value[c], sum[r][c]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            float* at = sums + r * width + c * V::lanes;
            if (whole)
                V::store(at, sum[r][c]);
            else
                V::store(at, sum[r][c], n);
        }
}

template <class V, class T, int R>
inline void dense_values(const float* chance, const float* keep, const T* values, int64_t stride, int64_t width,
                         int64_t from, int64_t to, float* sums) {
    constexpr int C = V::registers >= 32 ? 4 : 2; // an addition takes four steps: one register of sums would wait
    int64_t i = 0;
    for (; i + C * V::lanes <= width; i += C * V::lanes)
        dense_columns<V, T, R, C>(chance, keep, values + i, stride, width, from, to, C * V::lanes, sums + i);
    for (; i < width; i += V::lanes) {
        const int n = width - i < V::lanes ? static_cast<int>(width - i) : V::lanes;
        dense_columns<V, T, R, 1>(chance, keep, values + i, stride, width, from, to, n, sums + i);
    }
}

// `count` tokens of which the first is at position `first`. chances [rows, 64], keep [rows]: room.
template <class V, class T>
inline void dense_tokens(const KvAttentionCall& c, const KvQueries& q, const KvSpan& span, const KvDense& dense,
                         int64_t first, int64_t count, int64_t row, int64_t kv_head, float* chances, float* keep,
                         const KvPartial& to) {
    const int64_t rows = c.group * c.tokens, width = c.head_dim_v;
    const int64_t oldest = dense.first == nullptr ? 0 : dense.first[row];
    for (int64_t begin = 0, n = 0; begin < count; begin += n) {
        const int64_t slot = (oldest + begin) % dense.slots, left = count - begin;
        n = dense.slots - slot < kv_page ? dense.slots - slot : kv_page;
        n = left < n ? left : n;
        const T* keys = static_cast<const T*>(dense.keys) + row * dense.key_batch + slot * dense.key_token +
                        kv_head * dense.key_head;
        const T* values = static_cast<const T*>(dense.values) + row * dense.value_batch + slot * dense.value_token +
                          kv_head * dense.value_head;
        tiles_of<4, 1>(rows, [&](int64_t r, auto count) {
            dense_scores<V, T, decltype(count)::value>(q.values + r * q.value_row, q.value_row, keys, dense.key_token,
                                                       c.head_dim, n, c.scale, chances + r * kv_page);
        });
        int64_t from = n, last = 0; // that any query sees
        for (int64_t r = 0; r < rows; ++r) {
            float* of_row = chances + r * kv_page;
            for (int64_t t = n; t < kv_page; ++t)
                of_row[t] = 0; // softcap reads them
            const KvRange range = seen_range(span, r % c.tokens, first + begin, n);
            keep[r] = 1;
            if (range.from < range.to) {
                keep[r] = softmax_block<V>(of_row, range, c.softcap, of_row, to.most + r, to.weight + r);
                from = range.from < from ? range.from : from;
                last = range.to > last ? range.to : last;
            }
            for (int64_t t = 0; t < n; ++t)
                if (t < range.from || t >= range.to)
                    of_row[t] = 0;
        }
        if (from >= last)
            continue;
        tiles_of<4, 1>(rows, [&](int64_t r, auto count) {
            dense_values<V, T, decltype(count)::value>(chances + r * kv_page, keep + r, values, dense.value_token,
                                                       width, from, last, to.sums + r * width);
        });
    }
}

} // namespace
} // namespace bitpalette
