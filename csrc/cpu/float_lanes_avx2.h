// Float32 lanes for AVX2, FMA and F16C: one register of 8. Included by units compiled for it only.
#pragma once

#include <immintrin.h>

#include "float_lanes.h"

namespace bitpalette {
namespace {

struct Avx2 {
    using Floats = __m256;
    static constexpr int lanes = 8;
    static constexpr int registers = 16;

    static Floats zero() { return _mm256_setzero_ps(); }
    static Floats all(float value) { return _mm256_set1_ps(value); }
    static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
    static Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
    static Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
    static Floats divide(Floats a, Floats b) { return _mm256_div_ps(a, b); }
    static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    // b where one of the two is NaN
    static Floats minimum(Floats a, Floats b) { return _mm256_min_ps(a, b); }
    static Floats maximum(Floats a, Floats b) { return _mm256_max_ps(a, b); }
    static float total(Floats f) {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(f), _mm256_extractf128_ps(f, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
    // total(f[i]) at lane i
    static Floats totals(const Floats (&f)[lanes]) {
        const Floats low = _mm256_hadd_ps(_mm256_hadd_ps(f[0], f[1]), _mm256_hadd_ps(f[2], f[3]));
        const Floats high = _mm256_hadd_ps(_mm256_hadd_ps(f[4], f[5]), _mm256_hadd_ps(f[6], f[7]));
        return add(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
    }
    static float largest(Floats f) {
        const __m128 four = _mm_max_ps(_mm256_castps256_ps128(f), _mm256_extractf128_ps(f, 1));
        const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
    }
    // y * 2^n for the n in the low bits of `shifted`: added to y's exponent
    static Floats times_power_of_two(Floats y, Floats shifted) {
        const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
        return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), n));
    }

    static Floats load(const float* from) { return _mm256_loadu_ps(from); }
    static Floats load(const Bf16* from) {
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
    static Floats load(const Fp16* from) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    // the first n of 8, 0 for the others
    template <class T>
    static Floats load(const T* from, int n) {
        T part[lanes] = {};
        std::memcpy(part, from, static_cast<size_t>(n) * sizeof(T));
        return load(part);
    }
    static void store(float* to, Floats f) { _mm256_storeu_ps(to, f); }
    static void store(float* to, Floats f, int n) {
        float part[lanes];
        _mm256_storeu_ps(part, f);
        std::memcpy(to, part, static_cast<size_t>(n) * sizeof(float));
    }
};

} // namespace
} // namespace bitpalette
