// The int4 kernel for AVX2, FMA and F16C: 16 lanes are two registers.
#include "int4_body.h"

#if BITPALETTE_X86
#include <immintrin.h>

namespace bitpalette {
namespace {

struct Avx2 {
    struct Floats {
        __m256 a, b; // rows 0..7, 8..15
    };
    struct Ints {
        __m256i a, b;
    };
    using Codes = Ints; // 64 bytes
    struct Dot {
        Ints start;
        Ints pairs; // 16-bit sums of products
    };
    static constexpr int64_t most_tokens = 2; // 4 need 32 registers of the 16 there are

    static float half(uint16_t bits) { return _cvtsh_ss(bits); }
    static Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static Floats load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
    static void store(float* to, Floats f) {
        _mm256_storeu_ps(to, f.a);
        _mm256_storeu_ps(to + 8, f.b);
    }
    static Floats load_halves(const uint16_t* from) {
        return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))),
                _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 8)))};
    }
    static void store_halves(uint16_t* to, Floats f) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(f.a, _MM_FROUND_TO_NEAREST_INT));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8), _mm256_cvtps_ph(f.b, _MM_FROUND_TO_NEAREST_INT));
    }
    static Floats scaled(Floats f, float by) {
        const __m256 factor = _mm256_set1_ps(by);
        return {_mm256_mul_ps(f.a, factor), _mm256_mul_ps(f.b, factor)};
    }
    static Floats multiply_add(Floats a, Floats b, Floats c) {
        return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)};
    }
    static Floats to_floats(Ints i) { return {_mm256_cvtepi32_ps(i.a), _mm256_cvtepi32_ps(i.b)}; }
    static Ints integer(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
    static Ints load_bytes(const uint8_t* from) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
    }
    static Ints times(Ints i, int32_t by) {
        const __m256i factor = _mm256_set1_epi32(by);
        return {_mm256_mullo_epi32(i.a, factor), _mm256_mullo_epi32(i.b, factor)};
    }
    static Codes load_codes(const uint8_t* from) {
        return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)),
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32))};
    }
    static Codes low(Codes c) {
        const __m256i mask = _mm256_set1_epi8(15);
        return {_mm256_and_si256(c.a, mask), _mm256_and_si256(c.b, mask)};
    }
    static Codes high(Codes c) { return low({_mm256_srli_epi16(c.a, 4), _mm256_srli_epi16(c.b, 4)}); }
    static Dot start(Ints i) { return {i, {_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
    // A tile adds 8 times here, each at most 2 * 15 * 127 = 3810 in magnitude: 30480 fits in 16 bits.
    static Dot add_products(Dot d, Codes c, const int8_t* input) {
        int32_t four;
        std::memcpy(&four, input, sizeof four);
        const __m256i x = _mm256_set1_epi32(four);
        d.pairs.a = _mm256_add_epi16(d.pairs.a, _mm256_maddubs_epi16(c.a, x));
        d.pairs.b = _mm256_add_epi16(d.pairs.b, _mm256_maddubs_epi16(c.b, x));
        return d;
    }
    static Ints finish(Dot d) {
        const __m256i ones = _mm256_set1_epi16(1);
        return {_mm256_add_epi32(d.start.a, _mm256_madd_epi16(d.pairs.a, ones)),
                _mm256_add_epi32(d.start.b, _mm256_madd_epi16(d.pairs.b, ones))};
    }
    static void decode_tile_row(const uint8_t* codes, float zero, float scale, float* to) {
        const __m256 z = _mm256_set1_ps(zero), s = _mm256_set1_ps(scale);
        const __m128i mask = _mm_set1_epi8(15);
        for (int step = 0; step < steps; ++step) {
            int32_t four;
            std::memcpy(&four, codes + step * 64, sizeof four);
            const __m128i bytes = _mm_cvtsi32_si128(four);
            const __m128i low = _mm_and_si128(bytes, mask), high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
            const __m256 code = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_unpacklo_epi32(low, high)));
            _mm256_storeu_ps(to + 8 * step, _mm256_mul_ps(_mm256_sub_ps(code, z), s));
        }
    }
};

} // namespace

const Int4Ops int4_avx2{quantize<Avx2>, linear<Avx2>, rows<Avx2>};

} // namespace bitpalette
#endif
