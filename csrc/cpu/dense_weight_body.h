// The body of dense_weight_*.cpp over the float lanes V: dot products of rows, as they lie in memory, with the tokens.
#pragma once

#include "dense_weight.h"
#include "float_lanes.h"

namespace bitpalette {
namespace {

// The hardware's prefetcher stops at each 4 KiB page, and rows follow each other in memory (int4_body.h measured it).
constexpr int64_t dense_prefetch_bytes = 1024;

// y[t * y_row] = dot(w, x_t) for M tokens. U sums for each of them hide the latency of the additions.
template <class V, class T, int M, int U>
inline void dense_row(const T* w, int64_t in, const float* x, int64_t x_row, float* y, int64_t y_row) {
    typename V::Floats sums[M][U];
    for (int m = 0; m < M; ++m)
        for (int u = 0; u < U; ++u)
            sums[m][u] = V::zero();
    int64_t k = 0;
    for (; k + U * V::lanes <= in; k += U * V::lanes)
        for (int u = 0; u < U; ++u) {
            const int64_t at = k + u * V::lanes;
            // past the end is harmless
            __builtin_prefetch(reinterpret_cast<const char*>(w + at) + dense_prefetch_bytes);
            const typename V::Floats values = V::load(w + at);
            for (int m = 0; m < M; ++m)
                sums[m][u] = V::multiply_add(values, V::load(x + m * x_row + at), sums[m][u]);
        }
    for (; k < in; k += V::lanes) {
        const typename V::Floats values =
            k + V::lanes <= in ? V::load(w + k) : V::load(w + k, static_cast<int>(in - k));
        for (int m = 0; m < M; ++m) // rows of x go on with zeros
            sums[m][0] = V::multiply_add(values, V::load(x + m * x_row + k), sums[m][0]);
    }
    for (int m = 0; m < M; ++m) {
        for (int u = 1; u < U; ++u)
            sums[m][0] = V::add(sums[m][0], sums[m][u]);
        y[m * y_row] = V::total(sums[m][0]);
    }
}

template <class V, class T>
void dense_multiply(const void* values, int64_t in, const FloatInput& x, int64_t tokens, float* y, int64_t y_row,
                    int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
        const T* w = static_cast<const T*>(values) + r * in; // in the cache from the second group of tokens on
        int64_t t = 0;
        for (; t + 4 <= tokens; t += 4)
            dense_row<V, T, 4, 2>(w, in, x.values + t * x.row, x.row, y + t * y_row + r, y_row);
        for (; t + 2 <= tokens; t += 2)
            dense_row<V, T, 2, 4>(w, in, x.values + t * x.row, x.row, y + t * y_row + r, y_row);
        for (; t < tokens; ++t)
            dense_row<V, T, 1, 4>(w, in, x.values + t * x.row, x.row, y + t * y_row + r, y_row);
    }
}

template <class V, class T>
void dense_one_row(const void* values, int64_t in, float* to) {
    const T* w = static_cast<const T*>(values);
    int64_t k = 0;
    for (; k + V::lanes <= in; k += V::lanes)
        V::store(to + k, V::load(w + k));
    if (k < in)
        V::store(to + k, V::load(w + k, static_cast<int>(in - k)), static_cast<int>(in - k));
}

template <class V>
constexpr DenseUnit dense_unit{{
    {dense_multiply<V, float>, dense_one_row<V, float>},
    {dense_multiply<V, Fp16>, dense_one_row<V, Fp16>},
    {dense_multiply<V, Bf16>, dense_one_row<V, Bf16>},
}};

} // namespace
} // namespace bitpalette
