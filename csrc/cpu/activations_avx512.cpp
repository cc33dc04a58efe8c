// Activations for AVX-512.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // gcc 12's own avx512fintrin.h, hundreds of lines of it
#endif
#include "activations_body.h"

#if BITPALETTE_X86
#include <immintrin.h>

namespace bitpalette {
namespace {

struct Avx512 {
    using Floats = __m512;
    using Ints = __m512i;
    static constexpr int lanes = 16;

    template <Dtype D>
    static Floats load(const void* from, int64_t i) {
        if constexpr (D == Dtype::f32)
            return _mm512_loadu_ps(static_cast<const float*>(from) + i);
        const auto* halves = reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(from) + i);
        if constexpr (D == Dtype::f16)
            return _mm512_cvtph_ps(_mm256_loadu_si256(halves));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(halves)), 16));
    }
    static void store(float* to, Floats f) { _mm512_storeu_ps(to, f); }
    template <Dtype D>
    static void store(void* to, int64_t i, Floats f) {
        auto* halves = reinterpret_cast<__m256i*>(static_cast<uint16_t*>(to) + i);
        if constexpr (D == Dtype::f32)
            _mm512_storeu_ps(static_cast<float*>(to) + i, f);
        else if constexpr (D == Dtype::f16)
            _mm256_storeu_si256(halves, _mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
        else
            _mm256_storeu_si256(halves, _mm512_cvtepi32_epi16(bf16(f)));
    }
    static Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats plus(Floats a, Floats b) { return _mm512_add_ps(a, b); }

    static Ints integer(int32_t value) { return _mm512_set1_epi32(value); }
    static Ints plus(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
    static Ints magnitude(Floats f) { return _mm512_and_si512(_mm512_castps_si512(f), integer(0x7FFFFFFF)); }
    static Ints largest(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
    static int32_t largest_of(Ints i) { return _mm512_reduce_max_epi32(i); }
    static int32_t sum_of(Ints i) { return _mm512_reduce_add_epi32(i); }
    // by the rounding mode in force, nearest even where nobody changed it
    static Ints rounded(Floats f, float by) { return _mm512_cvtps_epi32(_mm512_mul_ps(f, _mm512_set1_ps(by))); }
    static Ints shifted_right_8(Ints i) { return _mm512_srai_epi32(i, 8); }
    static void store_bytes(int8_t* to, Ints i) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(i));
    }

  private:
    // as bf16_of_float in half.h
    static Ints bf16(Floats f) {
        const Ints bits = _mm512_castps_si512(f), high = _mm512_srli_epi32(bits, 16);
        const Ints odd = _mm512_and_si512(high, integer(1));
        const Ints even = _mm512_srli_epi32(plus(plus(bits, integer(0x7FFF)), odd), 16);
        return _mm512_mask_or_epi32(even, _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q), high, integer(0x40));
    }
};

} // namespace

const ActivationOps activations_avx512{load<Avx512>, quantize<Avx512>, store<Avx512>};

} // namespace bitpalette
#endif
