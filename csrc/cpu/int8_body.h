// The kernel for bytes in canonical layout, written once over a vocabulary V; each int8_<isa>.cpp defines V and
// includes this file. A register has V::columns codes. Everything is in an unnamed namespace, and nothing of the
// standard library's templates is called (see codes_body.h).
#pragma once

#include <cstring>

#include "half.h"
#include "int8.h"

namespace bitpalette {
namespace {

inline void expand(const Int8Input& x, int32_t* start, float* scale) {
    const int64_t quads = x.tokens * x.row / int8_quad_columns, quads_per_block = x.blocks.block / int8_quad_columns;
    for (int64_t q = 0; q < quads; ++q) {
        int32_t sum = 0;
        for (int i = 0; i < int8_quad_columns; ++i)
            sum += x.blocks.codes[q * int8_quad_columns + i];
        start[q] = -128 * sum;
    }
    if (x.blocks.low != nullptr)
        for (int64_t q = 0; q < quads; ++q) {
            int32_t sum = 0;
            for (int i = 0; i < int8_quad_columns; ++i)
                sum += x.blocks.low[q * int8_quad_columns + i];
            start[q] = 256 * start[q] - 128 * sum;
        }
    const float unit = x.blocks.low == nullptr ? 1.0f : 1.0f / 256; // of a whole number that two planes say
    for (int64_t b = 0; b < quads / quads_per_block; ++b)
        for (int64_t q = 0; q < quads_per_block; ++q)
            scale[b * quads_per_block + q] = unit * x.blocks.scale[b];
}

// The codes of R rows from a column on; beyond the last column they are those of zero.
template <class V, int R>
struct Columns {
    const uint8_t* at[R];
    alignas(64) uint8_t last[R][V::columns];

    Columns(const Int8View& w, int64_t row, int64_t column) {
        const int64_t n = w.in - column;
        for (int r = 0; r < R; ++r) {
            at[r] = w.codes + (row + r) * w.in + column;
            if (n < V::columns) {
                std::memset(last[r], 128, sizeof last[r]);
                std::memcpy(last[r], at[r], static_cast<size_t>(n));
                at[r] = last[r];
            }
        }
    }
};

template <class V, int planes, int R, int M>
inline void add_integers(const Columns<V, R>& columns, const Int8Input& x, int64_t token, int64_t column,
                         typename V::Floats (&sums)[M][R]) {
    typename V::Codes codes[R];
    for (int r = 0; r < R; ++r)
        codes[r] = V::load_codes(columns.at[r]);
    for (int m = 0; m < M; ++m) {
        const int64_t at = (token + m) * x.row + column;
        const typename V::Ints start = V::load_ints(x.start + at / int8_quad_columns);
        const typename V::Floats scale = V::load(x.scale + at / int8_quad_columns);
        const typename V::Input high = V::load_input(x.blocks.codes + at);
        for (int r = 0; r < R; ++r) {
            typename V::Ints sum;
            if constexpr (planes == 1)
                sum = V::add_products(start, codes[r], high);
            else
                sum = V::combined(V::add_products(V::no_ints(), codes[r], high),
                                  V::add_products(start, codes[r], V::load_input(x.blocks.low + at)));
            sums[m][r] = V::multiply_add(V::to_floats(sum), scale, sums[m][r]);
        }
    }
}

template <class V, int R, int M>
inline void add_floats(const Columns<V, R>& columns, const Int8Input& x, int64_t token, int64_t column,
                       typename V::Floats (&sums)[M][R]) {
    for (int part = 0; part < V::columns; part += V::lanes) {
        typename V::Floats levels[R];
        for (int r = 0; r < R; ++r)
            levels[r] = V::levels(columns.at[r] + part);
        for (int m = 0; m < M; ++m) {
            const typename V::Floats values = V::load(x.values + (token + m) * x.row + column + part);
            for (int r = 0; r < R; ++r)
                sums[m][r] = V::multiply_add(levels[r], values, sums[m][r]);
        }
    }
}

// planes: 1, 2, or 0 for float32.
template <class V, int planes, int R, int M>
void multiply_rows(const Int8View& w, const Int8Input& x, int64_t row, int64_t token, float* y, int64_t y_row) {
    typename V::Floats sums[M][R];
    for (int m = 0; m < M; ++m)
        for (int r = 0; r < R; ++r)
            sums[m][r] = V::zero();
    for (int64_t column = 0; column < w.in; column += V::columns) {
        const Columns<V, R> columns(w, row, column);
        // The hardware's own prefetcher stops at each 4 KiB page: the same columns of the next rows.
        for (int r = 0; r < R; ++r)
            __builtin_prefetch(w.codes + (row + R + r) * w.in + column);
        if constexpr (planes == 0)
            add_floats<V, R, M>(columns, x, token, column, sums);
        else
            add_integers<V, planes, R, M>(columns, x, token, column, sums);
    }
    for (int r = 0; r < R; ++r) {
        const float scale = float_of_fp16(w.scale[row + r]);
        for (int m = 0; m < M; ++m)
            y[(token + m) * y_row + row + r] = V::total(sums[m][r]) * scale;
    }
}

template <class V, int planes, int R>
void multiply_tokens(const Int8View& w, const Int8Input& x, int64_t row, float* y, int64_t y_row) {
    int64_t token = 0;
    for (; token + V::most_tokens <= x.tokens; token += V::most_tokens)
        multiply_rows<V, planes, R, V::most_tokens>(w, x, row, token, y, y_row);
    if constexpr (V::most_tokens > 2)
        for (; token + 2 <= x.tokens; token += 2)
            multiply_rows<V, planes, R, 2>(w, x, row, token, y, y_row);
    for (; token < x.tokens; ++token)
        multiply_rows<V, planes, R, 1>(w, x, row, token, y, y_row);
}

template <class V, int planes>
void multiply(const Int8View& w, const Int8Input& x, float* y, int64_t y_row, int64_t begin, int64_t end) {
    int64_t row = begin;
    for (; row + V::most_rows <= end; row += V::most_rows)
        multiply_tokens<V, planes, V::most_rows>(w, x, row, y, y_row);
    for (; row < end; ++row)
        multiply_tokens<V, planes, 1>(w, x, row, y, y_row);
}

inline void decode(const Int8View& w, int64_t row, float* to) {
    const uint8_t* codes = w.codes + row * w.in;
    const float scale = float_of_fp16(w.scale[row]);
    for (int64_t i = 0; i < w.in; ++i)
        to[i] = static_cast<float>(static_cast<int8_t>(codes[i] ^ 0x80)) * scale; // code - 128
}

template <class V>
constexpr Int8Unit int8_unit() {
    return {expand, multiply<V, 1>, multiply<V, 2>, multiply<V, 0>, decode};
}

} // namespace
} // namespace bitpalette
