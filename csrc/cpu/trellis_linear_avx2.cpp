// The trellis kernel for AVX2 and FMA: a tile's row is two registers.
#include "trellis_linear_body.h"

#if BITPALETTE_X86
#include <immintrin.h>

namespace bitpalette {
namespace {

struct Avx2 {
    using Floats = __m256;
    using Ints = __m256i;
    static constexpr int lanes = 8, parts = 2;
    static constexpr int most_chained = 2; // tokens with two sums each: of 16 registers, half are for decoding

    static Floats zero() { return _mm256_setzero_ps(); }
    static Floats all(float value) { return _mm256_set1_ps(value); }
    static Floats load(const float* from) { return _mm256_loadu_ps(from); }
    static void store(float* to, Floats f) { _mm256_storeu_ps(to, f); }
    static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
    static Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
    static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    static float total(Floats f) {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(f), _mm256_extractf128_ps(f, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
    static Ints integer(uint32_t value) { return _mm256_set1_epi32(static_cast<int>(value)); }
    static Ints load_ints(const void* from) { return _mm256_load_si256(static_cast<const __m256i*>(from)); }
    static Ints both(Ints a, Ints b) { return _mm256_and_si256(a, b); }
    static Ints shift_right(Ints i, Ints by) { return _mm256_srlv_epi32(i, by); }
    static Ints times(Ints a, Ints b) { return _mm256_mullo_epi32(a, b); }
    // vpshufb picks within 128 bits, and both have the whole piece
    static Ints bytes(const uint8_t* piece, Ints pick) {
        const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(piece));
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(sixteen), pick);
    }
    // two bytes to 16 bits (at most 510, no saturation), two of those to 32
    static Floats level(Ints product) {
        const __m256i pairs = _mm256_maddubs_epi16(product, _mm256_set1_epi8(1));
        const __m256i sums = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
        return _mm256_cvtepi32_ps(_mm256_sub_epi32(sums, _mm256_set1_epi32(510)));
    }
};

} // namespace

const TrellisLinearUnit trellis_linear_avx2{linear<Avx2>, decode<Avx2>};

} // namespace bitpalette
#endif
