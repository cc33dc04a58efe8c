// Activations for AVX2, FMA and F16C.
#include "activations_body.h"

#if BITPALETTE_X86
#include <immintrin.h>

namespace bitpalette {
namespace {

struct Avx2 {
    using Floats = __m256;
    using Ints = __m256i;
    static constexpr int lanes = 8;

    template <Dtype D>
    static Floats load(const void* from, int64_t i) {
        if constexpr (D == Dtype::f32)
            return _mm256_loadu_ps(static_cast<const float*>(from) + i);
        const auto* halves = reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(from) + i);
        if constexpr (D == Dtype::f16)
            return _mm256_cvtph_ps(_mm_loadu_si128(halves));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(halves)), 16));
    }
    static void store(float* to, Floats f) { _mm256_storeu_ps(to, f); }
    template <Dtype D>
    static void store(void* to, int64_t i, Floats f) {
        auto* halves = reinterpret_cast<__m128i*>(static_cast<uint16_t*>(to) + i);
        if constexpr (D == Dtype::f32) {
            _mm256_storeu_ps(static_cast<float*>(to) + i, f);
        } else if constexpr (D == Dtype::f16) {
            _mm_storeu_si128(halves, _mm256_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
        } else {
            const Ints b = bf16(f); // all below 2^16: the saturating pack leaves them as they are
            _mm_storeu_si128(halves, _mm_packus_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1)));
        }
    }
    static Floats times(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
    static Floats plus(Floats a, Floats b) { return _mm256_add_ps(a, b); }

    static Ints integer(int32_t value) { return _mm256_set1_epi32(value); }
    static Ints plus(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
    static Ints magnitude(Floats f) { return _mm256_and_si256(_mm256_castps_si256(f), integer(0x7FFFFFFF)); }
    static Ints largest(Ints a, Ints b) { return _mm256_max_epi32(a, b); }
    static int32_t largest_of(Ints i) {
        __m128i four = _mm_max_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
        four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E));
        return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
    }
    static int32_t sum_of(Ints i) {
        __m128i four = _mm_add_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
        four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
        return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
    }
    // by the rounding mode in force, nearest even where nobody changed it
    static Ints rounded(Floats f, float by) { return _mm256_cvtps_epi32(_mm256_mul_ps(f, _mm256_set1_ps(by))); }
    static Ints shifted_right_8(Ints i) { return _mm256_srai_epi32(i, 8); }
    static void store_bytes(int8_t* to, Ints i) {
        const __m256i lowest = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, //
                                                0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
        const __m256i bytes = _mm256_shuffle_epi8(i, lowest); // 4 bytes at the foot of each half
        const __m128i eight = _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to), eight);
    }

  private:
    // as bf16_of_float in half.h
    static Ints bf16(Floats f) {
        const Ints bits = _mm256_castps_si256(f), high = _mm256_srli_epi32(bits, 16);
        const Ints odd = _mm256_and_si256(high, integer(1));
        const Ints even = _mm256_srli_epi32(plus(plus(bits, integer(0x7FFF)), odd), 16);
        const Ints nan = _mm256_castps_si256(_mm256_cmp_ps(f, f, _CMP_UNORD_Q));
        return _mm256_blendv_epi8(even, _mm256_or_si256(high, integer(0x40)), nan);
    }
};

} // namespace

const ActivationOps activations_avx2{load<Avx2>, quantize<Avx2>, store<Avx2>};

} // namespace bitpalette
#endif
