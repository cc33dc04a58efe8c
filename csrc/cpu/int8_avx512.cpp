// The kernel for bytes in canonical layout for AVX-512 with VNNI.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // gcc 12's own avx512fintrin.h, hundreds of lines of it
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include "int8_body.h"

#if BITPALETTE_X86
#include <immintrin.h>

namespace bitpalette {
namespace {

struct Avx512 {
    using Floats = __m512;
    using Ints = __m512i;
    using Codes = __m512i;
    using Input = __m512i;
    static constexpr int columns = 64, lanes = 16, most_rows = 4, most_tokens = 4;

    static Floats zero() { return _mm512_setzero_ps(); }
    static Floats load(const float* from) { return _mm512_loadu_ps(from); }
    static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static float total(Floats f) { return _mm512_reduce_add_ps(f); }
    static Floats to_floats(Ints i) { return _mm512_cvtepi32_ps(i); }
    static Ints no_ints() { return _mm512_setzero_si512(); }
    static Ints load_ints(const int32_t* from) { return _mm512_loadu_si512(from); }
    static Codes load_codes(const uint8_t* from) { return _mm512_loadu_si512(from); }
    static Input load_input(const int8_t* from) { return _mm512_loadu_si512(from); }
    // vpdpbusd: each lane adds four products of unsigned and signed bytes to its 32-bit sum, without saturation
    static Ints add_products(Ints start, Codes c, Input x) { return _mm512_dpbusd_epi32(start, c, x); }
    static Ints combined(Ints high, Ints low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low); }
    static Floats levels(const uint8_t* from) {
        const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_xor_si128(codes, _mm_set1_epi8(-128))));
    }
};

} // namespace

const Int8Unit int8_avx512 = int8_unit<Avx512>();

} // namespace bitpalette
#endif
