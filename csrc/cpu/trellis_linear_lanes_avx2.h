// The vocabulary of trellis kernels for AVX2, for the units of AVX2 and of what adds to it.
#pragma once

#include <immintrin.h>

#include "trellis_linear_unit.h"

namespace bitpalette {
namespace {

struct Avx2 {
    using Floats = __m256;
    using Ints = __m256i;
    static constexpr int lanes = 8, rows = 1;
    static constexpr bool byte_products = false; // vpmaddubsw saturates: 2 * 255 * 127 is more than 16 bits hold

    static Floats all(float value) { return _mm256_set1_ps(value); }
    static Floats load(const float* from) { return _mm256_load_ps(from); }
    static void store(float* to, Floats f) { _mm256_store_ps(to, f); }
    static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    static Floats to_floats(Ints i) { return _mm256_cvtepi32_ps(i); }
    static void row_totals(Floats f, float* to) {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(f), _mm256_extractf128_ps(f, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        *to = _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
    static Ints shorts(uint16_t value) { return _mm256_set1_epi16(static_cast<int16_t>(value)); }
    static Ints load_aligned(const void* from) { return _mm256_load_si256(static_cast<const __m256i*>(from)); }
    static Ints load_row(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
    static Ints load_pairs(const int32_t* from) { return load_row(from); }
    // vpshufb picks within 128 bits, and both have the whole piece
    static Ints bytes(const uint8_t* const* pieces, Ints pick) {
        const __m128i piece = _mm_loadu_si128(reinterpret_cast<const __m128i*>(pieces[0]));
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(piece), pick);
    }
    static Ints shift_right(Ints i, Ints by) { return _mm256_srlv_epi32(i, by); }
    static Ints shift_left(Ints i, Ints by) { return _mm256_sllv_epi32(i, by); }
    static Ints odd_halves(Ints even, Ints odd) { return _mm256_blend_epi16(even, odd, 0xAA); }
    static Ints both(Ints a, Ints b) { return _mm256_and_si256(a, b); }
    static Ints times(Ints a, Ints b) { return _mm256_mullo_epi16(a, b); }
    static Ints times_high(Ints a, Ints b) { return _mm256_mulhi_epu16(a, b); }
    static Ints add_shorts(Ints a, Ints b) { return _mm256_add_epi16(a, b); }
    static Ints byte_pairs(Ints i) { return _mm256_maddubs_epi16(i, _mm256_set1_epi8(1)); } // at most 510
    static Ints add_products(Ints sum, Ints a, Ints b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
    static void store_weights(Ints level, float scale, float* to) {
        const Ints centred = _mm256_sub_epi16(level, _mm256_set1_epi16(510));
        const auto weights = [&](__m128i part) {
            return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(part)), _mm256_set1_ps(scale));
        };
        _mm256_storeu_ps(to, weights(_mm256_castsi256_si128(centred)));
        _mm256_storeu_ps(to + 8, weights(_mm256_extracti128_si256(centred, 1)));
    }
};

} // namespace
} // namespace bitpalette
