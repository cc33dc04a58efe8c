// The trellis kernel for AVX-512 with VNNI: a register is two rows of a tile.
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
    static constexpr int lanes = 16, rows = 2;
    static constexpr bool byte_products = true;

    static Floats all(float value) { return _mm512_set1_ps(value); }
    static Floats load(const float* from) { return _mm512_load_ps(from); }
    static void store(float* to, Floats f) { _mm512_store_ps(to, f); }
    static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static Floats to_floats(Ints i) { return _mm512_cvtepi32_ps(i); }
    static void row_totals(Floats f, float* to) {
        to[0] = _mm512_mask_reduce_add_ps(0x00FF, f);
        to[1] = _mm512_mask_reduce_add_ps(0xFF00, f);
    }
    static Ints zero() { return _mm512_setzero_si512(); }
    static Ints shorts(uint16_t value) { return _mm512_set1_epi16(static_cast<int16_t>(value)); }
    static Ints load_aligned(const void* from) { return _mm512_load_si512(from); }
    // 32 bytes for both rows
    static Ints load_row(const void* from) {
        return _mm512_broadcast_i64x4(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
    }
    static Ints load_pairs(const int32_t* from) { return load_row(from); }
    // vpshufb picks within 128 bits, and each 128 bits have the whole piece of their row
    static Ints bytes(const uint8_t* const* pieces, Ints pick) {
        const __m512i first = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(pieces[0])));
        const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(pieces[1]));
        return _mm512_shuffle_epi8(_mm512_mask_broadcast_i32x4(first, 0xFF00, second), pick);
    }
    static Ints shift_right(Ints i, Ints by) { return _mm512_srlv_epi32(i, by); }
    static Ints shift_left(Ints i, Ints by) { return _mm512_sllv_epi32(i, by); }
    static Ints odd_halves(Ints even, Ints odd) { return _mm512_mask_blend_epi16(0xAAAAAAAA, even, odd); }
    static Ints both(Ints a, Ints b) { return _mm512_and_si512(a, b); }
    static Ints times(Ints a, Ints b) { return _mm512_mullo_epi16(a, b); }
    static Ints times_high(Ints a, Ints b) { return _mm512_mulhi_epu16(a, b); }
    static Ints add_shorts(Ints a, Ints b) { return _mm512_add_epi16(a, b); }
    static Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
    static Ints byte_pairs(Ints i) { return _mm512_maddubs_epi16(i, _mm512_set1_epi8(1)); }
    static Ints add_products(Ints sum, Ints a, Ints b) { return _mm512_dpwssd_epi32(sum, a, b); }
    static Ints add_byte_products(Ints sum, Ints a, Ints b) { return _mm512_dpbusd_epi32(sum, a, b); }
    static void store_weights(Ints level, float scale, float* to) {
        const Ints centred = _mm512_sub_epi16(level, _mm512_set1_epi16(510));
        const auto weights = [&](__m256i part) {
            return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(part)), _mm512_set1_ps(scale));
        };
        _mm512_storeu_ps(to, weights(_mm512_castsi512_si256(centred)));
        _mm512_storeu_ps(to + trellis_side, weights(_mm512_extracti64x4_epi64(centred, 1)));
    }
};

} // namespace

const TrellisLinearUnit trellis_linear_avx512{multiply<Avx512>, decode<Avx512>, unpack<Avx512>};

} // namespace bitpalette
#endif
