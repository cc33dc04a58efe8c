// The vocabulary of bytes in canonical layout for AVX2, for the units of AVX2 and of what adds to it.
#pragma once

#include <immintrin.h>

#include "int8.h"

namespace bitpalette {
namespace {

struct Avx2 {
    using Floats = __m256;
    using Ints = __m256i;
    using Codes = __m256i;
    struct Input {
        __m256i even, odd; // bytes of even and odd columns, widened to 16 bits
    };
    static constexpr int columns = 32, lanes = 8, most_rows = 4, most_tokens = 2;

    static Floats zero() { return _mm256_setzero_ps(); }
    static Floats load(const float* from) { return _mm256_loadu_ps(from); }
    static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    static float total(Floats f) {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(f), _mm256_extractf128_ps(f, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
    }
    static Floats to_floats(Ints i) { return _mm256_cvtepi32_ps(i); }
    static Ints no_ints() { return _mm256_setzero_si256(); }
    static Ints load_ints(const int32_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
    static Codes load_codes(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
    static Input load_input(const int8_t* from) {
        const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        return {_mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), _mm256_srai_epi16(x, 8)};
    }
    // vpmaddubsw would saturate at 16 bits
    static Ints add_products(Ints start, Codes c, const Input& x) {
        const __m256i even = _mm256_and_si256(c, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(c, 8);
        return _mm256_add_epi32(start,
                                _mm256_add_epi32(_mm256_madd_epi16(even, x.even), _mm256_madd_epi16(odd, x.odd)));
    }
    static Ints combined(Ints high, Ints low) { return _mm256_add_epi32(_mm256_slli_epi32(high, 8), low); }
    static Floats levels(const uint8_t* from) {
        const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_xor_si128(codes, _mm_set1_epi8(-128))));
    }
};

} // namespace
} // namespace bitpalette
