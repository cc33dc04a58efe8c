// The inner loops of activations_ops.h over a vocabulary V of V::lanes values; each activations_<isa>.cpp defines V and
// includes this file. Everything is in an unnamed namespace and nothing of the standard library's templates is called,
// see int4_body.h.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "activations_ops.h"
#include "half.h"

namespace bitpalette {
namespace {

template <class V, Dtype D>
void load_as(const void* from, int64_t n, const float* factors, float* to) {
    int64_t i = 0;
    for (; i + V::lanes <= n; i += V::lanes) {
        const typename V::Floats x = V::template load<D>(from, i);
        V::store(to + i, factors == nullptr ? x : V::times(x, V::template load<Dtype::f32>(factors, i)));
    }
    for (; i < n; ++i)
        to[i] = load_element(from, D, i) * (factors == nullptr ? 1.0f : factors[i]);
}

template <class V>
void load(const void* from, Dtype dtype, int64_t n, const float* factors, float* to) {
    if (dtype == Dtype::f32)
        load_as<V, Dtype::f32>(from, n, factors, to);
    else if (dtype == Dtype::f16)
        load_as<V, Dtype::f16>(from, n, factors, to);
    else
        load_as<V, Dtype::bf16>(from, n, factors, to);
}

template <class V, Dtype D>
void store_as(const float* from, const void* bias, int64_t n, void* to) {
    int64_t i = 0;
    for (; i + V::lanes <= n; i += V::lanes) {
        const typename V::Floats x = V::template load<Dtype::f32>(from, i);
        V::template store<D>(to, i, bias == nullptr ? x : V::plus(x, V::template load<D>(bias, i)));
    }
    for (; i < n; ++i)
        store_element(to, D, i, bias == nullptr ? from[i] : from[i] + load_element(bias, D, i));
}

template <class V>
void store(const float* from, const void* bias, Dtype dtype, int64_t n, void* to) {
    if (dtype == Dtype::f32)
        store_as<V, Dtype::f32>(from, bias, n, to);
    else if (dtype == Dtype::f16)
        store_as<V, Dtype::f16>(from, bias, n, to);
    else
        store_as<V, Dtype::bf16>(from, bias, n, to);
}

template <class V, int Block, bool Planes>
void quantize_blocks(const float* x, int64_t blocks, int8_t* codes, int8_t* low, float* scale, int32_t* sum) {
    constexpr float units = Planes ? 32512.0f : 127.0f; // 127 * 256
    for (int64_t b = 0; b < blocks; ++b, x += Block, codes += Block, low += Planes ? Block : 0) {
        // magnitudes as integers are ordered as floats are, NaN above all
        typename V::Ints top = V::magnitude(V::template load<Dtype::f32>(x, 0));
        for (int i = V::lanes; i < Block; i += V::lanes)
            top = V::largest(top, V::magnitude(V::template load<Dtype::f32>(x, i)));
        const float largest = float_of_bits(static_cast<uint32_t>(V::largest_of(top)));
        if (!(largest <= FLT_MAX) || largest < 32512 * FLT_MIN) { // not finite, or 32512 / largest overflows
            std::memset(codes, 0, Block);
            if (Planes)
                std::memset(low, 0, Block);
            scale[b] = largest <= FLT_MAX ? 0.0f : NAN;
            sum[b] = 0;
            continue;
        }
        const float inverse = units / largest;
        typename V::Ints total = V::integer(0);
        for (int i = 0; i < Block; i += V::lanes) {
            const typename V::Ints code = V::rounded(V::template load<Dtype::f32>(x, i), inverse);
            total = V::plus(total, code);
            if (Planes) {
                V::store_bytes(codes + i, V::shifted_right_8(V::plus(code, V::integer(128))));
                V::store_bytes(low + i, code); // the low byte of code is code - 256 * high
            } else {
                V::store_bytes(codes + i, code);
            }
        }
        scale[b] = largest / 127.0f;
        sum[b] = V::sum_of(total);
    }
}

template <class V>
void quantize(const float* x, int64_t blocks, int block, int8_t* codes, int8_t* low, float* scale, int32_t* sum) {
    if (block == 32)
        quantize_blocks<V, 32, false>(x, blocks, codes, low, scale, sum);
    else if (block == 128)
        quantize_blocks<V, 128, false>(x, blocks, codes, low, scale, sum);
    else if (low == nullptr)
        quantize_blocks<V, 256, false>(x, blocks, codes, low, scale, sum);
    else
        quantize_blocks<V, 256, true>(x, blocks, codes, low, scale, sum);
}

} // namespace
} // namespace bitpalette
