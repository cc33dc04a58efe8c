// The steps of input_transform_ops.h over a vocabulary V of V::lanes values; each input_transform_<isa>.cpp defines V
// and includes this file. Everything is in an unnamed namespace, see int4_body.h.
//
// V::registers is how many vectors a Hadamard pass keeps: passes over a row, which costs a load and a store a vector,
// are then log2(n / (lanes * registers)) / log2(registers) beyond the first. V::columns x 4 sums make the odd factor's
// products: each load of x meets 4 factors, each factor V::columns vectors.
#pragma once

#include <cstdint>
#include <cstring>

#include "input_transform_ops.h"

namespace bitpalette {
namespace {

template <class V>
void multiply(float* x, const float* factors, int64_t n) {
    for (int64_t j = 0; j < n; j += V::lanes)
        V::store(x + j, V::times(V::load(x + j), V::load(factors + j)));
}

// The stages of stride Stride, 2 * Stride, ..., Width / 2, within one vector.
template <class V, int Stride, int Width>
inline typename V::Floats stages_within(typename V::Floats f) {
    if constexpr (Stride < Width)
        return stages_within<V, 2 * Stride, Width>(V::template butterfly<Stride>(f));
    else
        return f;
}

// The same over R vectors.
template <class V, int Stride, int R>
inline void stages_across(typename V::Floats (&f)[R]) {
    if constexpr (Stride < R) {
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i)
            if ((i & Stride) == 0) {
                const typename V::Floats a = f[i], b = f[i + Stride];
                f[i] = V::plus(a, b);
                f[i + Stride] = V::minus(a, b);
            }
        stages_across<V, 2 * Stride, R>(f);
    }
}

// Runs narrower than a vector: several are in each.
template <class V, int Width>
void hadamard_narrow(float* x, int64_t n) {
    for (int64_t j = 0; j < n; j += V::lanes)
        V::store(x + j, stages_within<V, 1, Width>(V::load(x + j)));
}

// All stages of strides below R * lanes, R the most that is no more than `vectors`. Returns R.
template <class V, int R>
int64_t hadamard_first(float* x, int64_t n, int64_t vectors) {
    if constexpr (R > 1)
        if (vectors < R)
            return hadamard_first<V, R / 2>(x, n, vectors);
    for (int64_t j = 0; j < n; j += R * V::lanes) {
        typename V::Floats f[R];
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i)
            f[i] = stages_within<V, 1, V::lanes>(V::load(x + j + i * V::lanes));
        stages_across<V, 1>(f);
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i)
            V::store(x + j + i * V::lanes, f[i]);
    }
    return R;
}

// The stages of strides stride, ..., stride * R / 2, R the most that is no more than `left`. Returns R.
template <class V, int R>
int64_t hadamard_next(float* x, int64_t n, int64_t stride, int64_t left) {
    if constexpr (R > 2)
        if (left < R)
            return hadamard_next<V, R / 2>(x, n, stride, left);
    for (int64_t first = 0; first < n; first += R * stride)
        for (int64_t j = first; j < first + stride; j += V::lanes) {
            typename V::Floats f[R];
#pragma GCC unroll 16
            for (int i = 0; i < R; ++i)
                f[i] = V::load(x + j + i * stride);
            stages_across<V, 1>(f);
#pragma GCC unroll 16
            for (int i = 0; i < R; ++i)
                V::store(x + j + i * stride, f[i]);
        }
    return R;
}

template <class V>
void hadamard(float* x, int64_t n, int64_t width) {
    const int64_t vectors = width / V::lanes;
    if (vectors > 0) {
        for (int64_t done = hadamard_first<V, V::registers>(x, n, vectors); done < vectors;)
            done *= hadamard_next<V, V::registers>(x, n, done * V::lanes, vectors / done);
    } else if (width == 2) {
        hadamard_narrow<V, 2>(x, n);
    } else if (width == 4) {
        hadamard_narrow<V, 4>(x, n);
    } else if (width == 8) {
        hadamard_narrow<V, 8>(x, n);
    }
}

// Rows i..i+I-1 of the product, J vectors of columns from column j on.
template <class V, int I, int J>
inline void odd_tile(const float* from, const OddFactor& o, int64_t i, int64_t j, float* to) {
    typename V::Floats sum[I][J];
#pragma GCC unroll 4
    for (int r = 0; r < I; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < J; ++c)
            sum[r][c] = V::zero();
    for (int64_t k = 0; k < o.p; ++k) {
        const float* factor = o.matrix + k * o.row + i; // symmetric: a column of rows i.. is a row
        typename V::Floats x[J];
#pragma GCC unroll 4
        for (int c = 0; c < J; ++c)
            x[c] = V::load(from + k * o.width + j + c * V::lanes);
#pragma GCC unroll 4
        for (int r = 0; r < I; ++r) {
            const typename V::Floats f = V::all(factor[r]);
#pragma GCC unroll 4
            for (int c = 0; c < J; ++c)
                sum[r][c] = V::multiply_add(f, x[c], sum[r][c]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < I; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < J; ++c)
            V::store(to + (i + r) * o.width + j + c * V::lanes, sum[r][c]);
}

// Columns outside: J vectors of every row stay in the first cache while all rows of the product are made of them.
template <class V, int J>
void odd_wide(const float* from, const OddFactor& o, float* to) {
    for (int64_t j = 0; j < o.width; j += J * V::lanes)
        for (int64_t i = 0; i < o.p;) {
            const int64_t left = o.p - i;
            if (left == 4 || left >= 6) { // 9 = 4 + 3 + 2: a single row would wait for its own sums
                odd_tile<V, 4, J>(from, o, i, j, to);
                i += 4;
            } else if (left >= 3) {
                odd_tile<V, 3, J>(from, o, i, j, to);
                i += 3;
            } else if (left == 2) {
                odd_tile<V, 2, J>(from, o, i, j, to);
                i += 2;
            } else {
                odd_tile<V, 1, J>(from, o, i, j, to);
                i += 1;
            }
        }
}

// Where rows are narrower than a vector, lanes are rows of the product: I vectors of them for all Width columns.
template <class V, int Width, int I>
inline void odd_lanes(const float* from, const OddFactor& o, int64_t i, float* to) {
    typename V::Floats sum[I][Width];
    for (int r = 0; r < I; ++r)
        for (int c = 0; c < Width; ++c)
            sum[r][c] = V::zero();
    for (int64_t k = 0; k < o.p; ++k) {
        typename V::Floats f[I];
#pragma GCC unroll 8
        for (int r = 0; r < I; ++r)
            f[r] = V::load(o.matrix + k * o.row + i + r * V::lanes);
#pragma GCC unroll 8
        for (int c = 0; c < Width; ++c) {
            const typename V::Floats x = V::all(from[k * Width + c]);
#pragma GCC unroll 8
            for (int r = 0; r < I; ++r)
                sum[r][c] = V::multiply_add(f[r], x, sum[r][c]);
        }
    }
    float values[V::lanes];
    for (int r = 0; r < I; ++r)
        for (int c = 0; c < Width; ++c) {
            V::store(values, sum[r][c]);
            const int64_t first = i + r * V::lanes;
            for (int64_t e = 0; e < V::lanes && first + e < o.p; ++e)
                to[(first + e) * Width + c] = values[e];
        }
}

template <class V, int Width>
void odd_narrow(const float* from, const OddFactor& o, float* to) {
    constexpr int most = Width >= 8 ? 1 : 8 / Width; // 8 sums: as many as multiply-adds are under way at a time
    int64_t i = 0;
    for (; i + most * V::lanes <= o.row; i += most * V::lanes)
        odd_lanes<V, Width, most>(from, o, i, to);
    for (; i < o.row; i += V::lanes)
        odd_lanes<V, Width, 1>(from, o, i, to);
}

template <class V>
void odd(const float* from, const OddFactor& o, float* to) {
    const int64_t vectors = o.width / V::lanes;
    if (vectors >= V::columns)
        odd_wide<V, V::columns>(from, o, to);
    else if (vectors >= 2)
        odd_wide<V, 2>(from, o, to);
    else if (vectors == 1)
        odd_wide<V, 1>(from, o, to);
    else if (o.width == 1)
        odd_narrow<V, 1>(from, o, to);
    else if (o.width == 2)
        odd_narrow<V, 2>(from, o, to);
    else if (o.width == 4)
        odd_narrow<V, 4>(from, o, to);
    else
        odd_narrow<V, 8>(from, o, to);
}

// Not the gather instructions: they are a third faster on a Sapphire Rapids (0.27 against 0.39 ns an element), and
// several times slower on the many machines whose microcode slows them down for safety (CVE-2022-40982).
template <class V>
void gather(const float* from, const int32_t* order, int64_t n, float* to) {
#pragma GCC unroll 8
    for (int64_t j = 0; j < n; ++j)
        to[j] = from[order[j]];
}

} // namespace
} // namespace bitpalette
