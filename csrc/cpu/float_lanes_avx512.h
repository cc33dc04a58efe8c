// Float32 lanes for AVX-512: one register of 16. Included by units compiled for it only.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
// gcc 12 warns of its own avx512fintrin.h, in hundreds of lines
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "float_lanes.h"

namespace bitpalette {
namespace {

struct Avx512 {
    using Floats = __m512;
    static constexpr int lanes = 16;
    static constexpr int registers = 32;

    static Floats zero() { return _mm512_setzero_ps(); }
    static Floats all(float value) { return _mm512_set1_ps(value); }
    static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
    static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
    static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    // b where one of the two is NaN
    static Floats minimum(Floats a, Floats b) { return _mm512_min_ps(a, b); }
    static Floats maximum(Floats a, Floats b) { return _mm512_max_ps(a, b); }
    static float total(Floats f) { return _mm512_reduce_add_ps(f); }
    // total(f[i]) at lane i, by a tree of shuffles: 45 instructions, sixteen totals take 110
    static Floats totals(const Floats (&f)[lanes]) {
        Floats fours[4]; // of lanes 4i..4i+3, four parts of each
        for (int i = 0; i < 4; ++i) {
            const Floats a =
                add(_mm512_unpacklo_ps(f[4 * i], f[4 * i + 1]), _mm512_unpackhi_ps(f[4 * i], f[4 * i + 1]));
            const Floats b =
                add(_mm512_unpacklo_ps(f[4 * i + 2], f[4 * i + 3]), _mm512_unpackhi_ps(f[4 * i + 2], f[4 * i + 3]));
            const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
            fours[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
        }
        const Floats low = fold(fours[0], fours[1]), high = fold(fours[2], fours[3]);
        return fold(low, high);
    }
    static float largest(Floats f) { return _mm512_reduce_max_ps(f); }
    // y * 2^n for the n in the low bits of `shifted`: added to y's exponent
    static Floats times_power_of_two(Floats y, Floats shifted) {
        const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
        return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(y), n));
    }

    static Floats load(const float* from) { return _mm512_loadu_ps(from); }
    static Floats load(const Bf16* from) {
        return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
    static Floats load(const Fp16* from) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
    // the first n of 16, 0 for the others
    static Floats load(const float* from, int n) { return _mm512_maskz_loadu_ps(first(n), from); }
    static Floats load(const Bf16* from, int n) { return widen_bf16(_mm256_maskz_loadu_epi16(first(n), from)); }
    static Floats load(const Fp16* from, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), from)); }
    static void store(float* to, Floats f) { _mm512_storeu_ps(to, f); }
    static void store(float* to, Floats f, int n) { _mm512_mask_storeu_ps(to, first(n), f); }

  private:
    // sums of neighbouring quarters: two of a, two of b
    static Floats fold(Floats a, Floats b) {
        return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
    }
    static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
    static Floats widen_bf16(__m256i halves) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
};

} // namespace
} // namespace bitpalette
