// The body of vector_math_*.cpp over the float lanes V.
#pragma once

#include <cmath>

#include "float_lanes.h"
#include "vector_math.h"

namespace bitpalette {
namespace {

// Calls step(first, n) for each group of lanes; n = V::lanes but for the last.
template <class V, class Step>
inline void each_group(int64_t n, const Step& step) {
    int64_t i = 0;
    for (; i + V::lanes <= n; i += V::lanes)
        step(i, V::lanes);
    if (i < n)
        step(i, static_cast<int>(n - i));
}

template <class V>
inline typename V::Floats load_some(const float* from, int n) {
    return n == V::lanes ? V::load(from) : V::load(from, n);
}

template <class V>
inline void store_some(float* to, typename V::Floats f, int n) {
    if (n == V::lanes)
        V::store(to, f);
    else
        V::store(to, f, n);
}

template <class V>
void rms_norm(const float* x, const float* gain, float eps, int64_t n, float* y) {
    typename V::Floats squares = V::zero();
    each_group<V>(n, [&](int64_t i, int k) {
        const typename V::Floats f = load_some<V>(x + i, k);
        squares = V::multiply_add(f, f, squares);
    });
    const float mean = V::total(squares) / static_cast<float>(n);
    const typename V::Floats factor = V::all(1.0f / __builtin_sqrtf(mean + eps));
    each_group<V>(n, [&](int64_t i, int k) {
        const typename V::Floats f = V::multiply(load_some<V>(x + i, k), factor);
        store_some<V>(y + i, V::multiply(f, load_some<V>(gain + i, k)), k);
    });
}

// x / (1 + e^-z)
template <class V>
inline typename V::Floats gated(typename V::Floats x, typename V::Floats z) {
    return V::divide(x, V::add(V::all(1.0f), exponential<V>(V::subtract(V::zero(), z))));
}

template <class V>
void silu_multiply(float* gate, const float* up, int64_t n) {
    each_group<V>(n, [&](int64_t i, int k) {
        const typename V::Floats x = load_some<V>(gate + i, k);
        store_some<V>(gate + i, V::multiply(gated<V>(x, x), load_some<V>(up + i, k)), k);
    });
}

template <class V>
void gelu_tanh_multiply(float* gate, const float* up, int64_t n) {
    // (1 + tanh u) / 2 = 1 / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3)
    const typename V::Floats linear = V::all(1.59576912f), cubic = V::all(1.59576912f * 0.044715f);
    each_group<V>(n, [&](int64_t i, int k) {
        const typename V::Floats x = load_some<V>(gate + i, k);
        const typename V::Floats z = V::multiply(x, V::multiply_add(V::multiply(x, x), cubic, linear));
        store_some<V>(gate + i, V::multiply(gated<V>(x, z), load_some<V>(up + i, k)), k);
    });
}

template <class V>
void add(const float* x, int64_t n, float* y) {
    each_group<V>(
        n, [&](int64_t i, int k) { store_some<V>(y + i, V::add(load_some<V>(y + i, k), load_some<V>(x + i, k)), k); });
}

template <class V>
void turn(float* x, const float* cosine, const float* sine, int64_t half) {
    each_group<V>(half, [&](int64_t i, int k) {
        const typename V::Floats a = load_some<V>(x + i, k), b = load_some<V>(x + half + i, k);
        const typename V::Floats c = load_some<V>(cosine + i, k), s = load_some<V>(sine + i, k);
        store_some<V>(x + i, V::subtract(V::multiply(a, c), V::multiply(b, s)), k);
        store_some<V>(x + half + i, V::multiply_add(b, c, V::multiply(a, s)), k);
    });
}

template <class V>
constexpr VectorMath vector_math_unit{rms_norm<V>, silu_multiply<V>, gelu_tanh_multiply<V>, add<V>, turn<V>};

} // namespace
} // namespace bitpalette
