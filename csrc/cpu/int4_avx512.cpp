// The int4 kernel for AVX-512 with VNNI: 16 lanes are one register.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // gcc 12's own avx512fintrin.h, hundreds of lines of it
#endif
#include "int4_body.h"

#if BITPALETTE_X86
#include <immintrin.h>

namespace bitpalette {
namespace {

struct Avx512 {
    using Floats = __m512;
    using Ints = __m512i;
    using Codes = __m512i;
    using Dot = __m512i;
    static constexpr int64_t most_tokens = 8;

    static float half(uint16_t bits) { return _cvtsh_ss(bits); }
    static Floats zero() { return _mm512_setzero_ps(); }
    static Floats load(const float* from) { return _mm512_loadu_ps(from); }
    static void store(float* to, Floats f) { _mm512_storeu_ps(to, f); }
    static Floats load_halves(const uint16_t* from) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
    static void store_halves(uint16_t* to, Floats f) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT));
    }
    static Floats scaled(Floats f, float by) { return _mm512_mul_ps(f, _mm512_set1_ps(by)); }
    static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static Floats to_floats(Ints i) { return _mm512_cvtepi32_ps(i); }
    static Ints integer(int32_t value) { return _mm512_set1_epi32(value); }
    static Ints load_bytes(const uint8_t* from) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    static Ints times(Ints i, int32_t by) { return _mm512_mullo_epi32(i, _mm512_set1_epi32(by)); }
    static Codes load_codes(const uint8_t* from) { return _mm512_loadu_si512(from); }
    static Codes low(Codes c) { return _mm512_and_si512(c, _mm512_set1_epi8(15)); }
    static Codes high(Codes c) { return low(_mm512_srli_epi16(c, 4)); }
    static Dot start(Ints i) { return i; }
    // vpdpbusd: each lane adds four products of unsigned and signed bytes to its 32-bit sum, without saturation
    static Dot add_products(Dot d, Codes c, const int8_t* input) {
        int32_t four;
        std::memcpy(&four, input, sizeof four);
        return _mm512_dpbusd_epi32(d, c, _mm512_set1_epi32(four));
    }
    static Ints finish(Dot d) { return d; }
    static void decode_tile_row(const uint8_t* codes, float zero, float scale, float* to) {
        const __m512 z = _mm512_set1_ps(zero), s = _mm512_set1_ps(scale);
        int32_t step[steps];
        for (int j = 0; j < steps; ++j)
            std::memcpy(&step[j], codes + j * 64, 4);
        const __m128i bytes = _mm_setr_epi32(step[0], step[1], step[2], step[3]), mask = _mm_set1_epi8(15);
        const __m128i low = _mm_and_si128(bytes, mask), high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
        const __m512 first = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi32(low, high)));
        const __m512 second = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_unpackhi_epi32(low, high)));
        _mm512_storeu_ps(to, _mm512_mul_ps(_mm512_sub_ps(first, z), s));
        _mm512_storeu_ps(to + 16, _mm512_mul_ps(_mm512_sub_ps(second, z), s));
    }
};

} // namespace

const Int4Ops int4_avx512{quantize<Avx512>, linear<Avx512>, rows<Avx512>};

} // namespace bitpalette
#endif
