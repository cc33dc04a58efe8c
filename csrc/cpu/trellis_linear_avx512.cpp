// The trellis kernel for AVX-512 with VNNI: a tile's row is one register.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // gcc 12's own avx512fintrin.h, hundreds of lines of it
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include "trellis_linear_body.h"

#if BITPALETTE_X86
#include <immintrin.h>

namespace bitpalette {
namespace {

struct Avx512 {
    using Floats = __m512;
    using Ints = __m512i;
    static constexpr int lanes = 16, parts = 1;
    static constexpr int most_chained = 4; // tokens with two sums each; from five on, one each fills the pipelines

    static Floats zero() { return _mm512_setzero_ps(); }
    static Floats all(float value) { return _mm512_set1_ps(value); }
    static Floats load(const float* from) { return _mm512_loadu_ps(from); }
    static void store(float* to, Floats f) { _mm512_storeu_ps(to, f); }
    static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static float total(Floats f) { return _mm512_reduce_add_ps(f); }
    static Ints integer(uint32_t value) { return _mm512_set1_epi32(static_cast<int>(value)); }
    static Ints load_ints(const void* from) { return _mm512_load_si512(from); }
    static Ints both(Ints a, Ints b) { return _mm512_and_si512(a, b); }
    static Ints shift_right(Ints i, Ints by) { return _mm512_srlv_epi32(i, by); }
    static Ints times(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
    // vpshufb picks within 128 bits, and each 128 bits have the whole piece
    static Ints bytes(const uint8_t* piece, Ints pick) {
        const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(piece));
        return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(sixteen), pick);
    }
    // vpdpbusd adds a lane's four bytes, times one, to -510
    static Floats level(Ints product) {
        return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_set1_epi32(-510), product, _mm512_set1_epi8(1)));
    }
};

} // namespace

const TrellisLinearUnit trellis_linear_avx512{linear<Avx512>, decode<Avx512>};

} // namespace bitpalette
#endif
