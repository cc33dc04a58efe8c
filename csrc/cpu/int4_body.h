// The int4 kernel, written once over a vocabulary V of 16 lanes (a lane is an output row); each int4_<isa>.cpp defines
// V and includes this file.
//
// Everything is in an unnamed namespace and nothing of the standard library's templates is called: a function with
// external linkage compiled here with, say, AVX-512 could be the copy that the linker keeps for all.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "int4.h"

namespace bitpalette {
namespace {

constexpr int lanes = int4_block_rows;
constexpr int tile_columns = int4_tile_columns;
constexpr int tile_bytes = int4_tile_bytes;
constexpr int steps = 4; // of 8 columns, 64 bytes

// The hardware's own prefetcher stops at each 4 KiB page; asking this far ahead took weights from memory at 10.5
// instead of 8 GB/s on one core of a Sapphire Rapids (512 bytes: no gain; 2 and 4 KiB: the same).
constexpr int prefetch_bytes = 1024;

inline float from_bf16(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

// Round to nearest even; NaN stays NaN.
inline uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? (bits >> 16 | 0x40) : rounded);
}

// n values from element `start` of an array of the given type to float32; the rest of the 32 are zero.
template <class V>
inline void load_tile(const void* from, Dtype dtype, int64_t start, int n, float* to) {
    alignas(64) uint16_t halves[tile_columns] = {};
    if (n < tile_columns)
        std::memset(to, 0, tile_columns * sizeof(float));
    if (dtype == Dtype::f32) {
        std::memcpy(to, static_cast<const float*>(from) + start, n * sizeof(float));
        return;
    }
    std::memcpy(halves, static_cast<const uint16_t*>(from) + start, n * sizeof(uint16_t));
    if (dtype == Dtype::bf16) {
        for (int i = 0; i < tile_columns; ++i)
            to[i] = from_bf16(halves[i]);
    } else {
        V::store(to, V::load_halves(halves));
        V::store(to + lanes, V::load_halves(halves + lanes));
    }
}

template <class V>
void quantize(const Int4Weight& w, const void* x, Dtype dtype, int64_t tokens, const Int8Input& to) {
    const int64_t tiles = w.tiles();
    for (int64_t token = 0; token < tokens; ++token) {
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t first = tile * tile_columns, at = token * tiles + tile;
            const int n = static_cast<int>(w.in - first < tile_columns ? w.in - first : tile_columns);
            alignas(64) float values[tile_columns];
            load_tile<V>(x, dtype, token * w.in + first, n, values);
            // the largest magnitude as integer bits: ordered as floats are, NaN above all, and a loop that vectorises
            int32_t bits[tile_columns], top = 0;
            std::memcpy(bits, values, sizeof bits);
            for (int i = 0; i < tile_columns; ++i) {
                const int32_t magnitude = bits[i] & 0x7FFFFFFF;
                top = magnitude > top ? magnitude : top;
            }
            float largest;
            std::memcpy(&largest, &top, sizeof largest);
            int8_t* codes = to.codes + at * tile_columns;
            if (!(largest <= FLT_MAX) || largest < 127 * FLT_MIN) { // not finite, or 127 / largest overflows
                std::memset(codes, 0, tile_columns);
                to.scale[at] = largest < FLT_MAX ? 0.0f : NAN;
                to.negative_sum[at] = 0;
                continue;
            }
            const float inverse = 127.0f / largest;
            int32_t sum = 0;
            for (int i = 0; i < tile_columns; ++i) {
                const float scaled = values[i] * inverse;
                const int32_t code = static_cast<int32_t>(scaled + (scaled < 0 ? -0.5f : 0.5f));
                codes[i] = static_cast<int8_t>(code);
                sum += code;
            }
            to.scale[at] = largest / 127.0f;
            to.negative_sum[at] = -sum;
        }
    }
}

template <class V>
inline void store_rows(void* y, const void* bias, Dtype dtype, int64_t at, int64_t row, int n,
                       typename V::Floats sums) {
    alignas(64) float values[lanes];
    V::store(values, sums);
    if (bias != nullptr) {
        alignas(64) float add[tile_columns];
        load_tile<V>(bias, dtype, row, n, add);
        for (int r = 0; r < lanes; ++r)
            values[r] += add[r];
    }
    if (dtype == Dtype::f32) {
        std::memcpy(static_cast<float*>(y) + at, values, n * sizeof(float));
        return;
    }
    alignas(64) uint16_t halves[lanes];
    if (dtype == Dtype::bf16)
        for (int r = 0; r < lanes; ++r)
            halves[r] = to_bf16(values[r]);
    else
        V::store_halves(halves, V::load(values));
    std::memcpy(static_cast<uint16_t*>(y) + at, halves, n * sizeof(uint16_t));
}

// One block of 16 rows times M tokens. Codes are loaded and split once for all M.
template <class V, int M>
void block_linear(const Int4Weight& w, const Int8Input& x, int64_t block, int64_t token, const void* bias, void* y,
                  Dtype dtype) {
    const int64_t tiles = w.tiles(), groups = w.groups(), per_group = w.tiles_per_group();
    const uint8_t* codes = w.codes + block * tiles * tile_bytes;
    typename V::Floats sums[M];
    for (int m = 0; m < M; ++m)
        sums[m] = V::zero();
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t parameters = (block * groups + group) * lanes;
        const typename V::Floats scale = V::load_halves(w.scale + parameters);
        const typename V::Ints zero = w.zero == nullptr ? V::integer(8) : V::load_bytes(w.zero + parameters);
        const int64_t end = (group + 1) * per_group < tiles ? (group + 1) * per_group : tiles;
        for (int64_t tile = group * per_group; tile < end; ++tile, codes += tile_bytes) {
            typename V::Dot dot[M];
            for (int m = 0; m < M; ++m)
                dot[m] = V::start(V::times(zero, x.negative_sum[(token + m) * tiles + tile]));
            for (int step = 0; step < steps; ++step) {
                __builtin_prefetch(codes + step * 64 + prefetch_bytes); // past the end is harmless
                const typename V::Codes both = V::load_codes(codes + step * 64);
                const typename V::Codes low = V::low(both), high = V::high(both);
                for (int m = 0; m < M; ++m) {
                    const int8_t* input = x.codes + ((token + m) * tiles + tile) * tile_columns + 8 * step;
                    dot[m] = V::add_products(dot[m], low, input);
                    dot[m] = V::add_products(dot[m], high, input + 4);
                }
            }
            for (int m = 0; m < M; ++m) {
                const typename V::Floats both_scales = V::scaled(scale, x.scale[(token + m) * tiles + tile]);
                sums[m] = V::multiply_add(V::to_floats(V::finish(dot[m])), both_scales, sums[m]);
            }
        }
    }
    const int64_t row = block * lanes;
    const int n = static_cast<int>(w.out - row < lanes ? w.out - row : lanes);
    for (int m = 0; m < M; ++m)
        store_rows<V>(y, bias, dtype, (token + m) * w.out + row, row, n, sums[m]);
}

template <class V>
void linear(const Int4Weight& w, const Int8Input& x, int64_t tokens, const void* bias, void* y, Dtype dtype,
            int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
        int64_t token = 0;
        if constexpr (V::most_tokens >= 8)
            for (; token + 8 <= tokens; token += 8)
                block_linear<V, 8>(w, x, block, token, bias, y, dtype);
        if constexpr (V::most_tokens >= 4)
            for (; token + 4 <= tokens; token += 4)
                block_linear<V, 4>(w, x, block, token, bias, y, dtype);
        for (; token + 2 <= tokens; token += 2)
            block_linear<V, 2>(w, x, block, token, bias, y, dtype);
        for (; token < tokens; ++token)
            block_linear<V, 1>(w, x, block, token, bias, y, dtype);
    }
}

template <class V>
void rows(const Int4Weight& w, const int64_t* index, int64_t begin, int64_t end, float* out) {
    const int64_t tiles = w.tiles(), groups = w.groups(), per_group = w.tiles_per_group();
    for (int64_t i = begin; i < end; ++i) {
        const int64_t block = index[i] / lanes, row = index[i] % lanes;
        float* to = out + i * w.in;
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t parameter = (block * groups + tile / per_group) * lanes + row;
            const float scale = V::half(w.scale[parameter]);
            const float zero = w.zero == nullptr ? 8.0f : static_cast<float>(w.zero[parameter]);
            const uint8_t* codes = w.codes + (block * tiles + tile) * tile_bytes + row * 4;
            const int64_t first = tile * tile_columns;
            if (first + tile_columns <= w.in) {
                V::decode_tile_row(codes, zero, scale, to + first);
            } else {
                alignas(64) float last[tile_columns];
                V::decode_tile_row(codes, zero, scale, last);
                std::memcpy(to + first, last, (w.in - first) * sizeof(float));
            }
        }
    }
}

} // namespace
} // namespace bitpalette
