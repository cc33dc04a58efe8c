// The code-plane kernel for AVX-512 with VNNI: 16 lanes are one register.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // gcc 12's own avx512fintrin.h, hundreds of lines of it
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include "codes_body.h"

#if BITPALETTE_X86
#include "codes_row_x86.h"

namespace bitpalette {
namespace {

struct Avx512 : RowX86 {
    using Floats = __m512;
    using Ints = __m512i;
    using Codes = __m512i;
    using Dot = __m512i;
    using Table = __m512;
    static constexpr int most_tokens = 8;
    static constexpr int most_sums = 4; // blocks times tokens in flight when blocks are read side by side

    static Floats zero() { return _mm512_setzero_ps(); }
    static Floats all(float value) { return _mm512_set1_ps(value); }
    static Floats load(const float* from) { return _mm512_loadu_ps(from); }
    static void store(float* to, Floats f) { _mm512_storeu_ps(to, f); }
    static Floats load_halves(const uint16_t* from) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
    static Floats scaled(Floats f, float by) { return _mm512_mul_ps(f, _mm512_set1_ps(by)); }
    static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static float total(Floats f) { return _mm512_reduce_add_ps(f); }
    static Floats to_floats(Ints i) { return _mm512_cvtepi32_ps(i); }
    static Ints integer(int32_t value) { return _mm512_set1_epi32(value); }
    static Ints load_bytes(const uint8_t* from) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    static Ints times(Ints i, int32_t by) { return _mm512_mullo_epi32(i, _mm512_set1_epi32(by)); }

    static Codes load_codes(const uint8_t* from) { return _mm512_loadu_si512(from); }
    static Codes load_sixteen(const uint8_t* from) {
        return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    template <int n>
    static Codes shift(Codes c) {
        if constexpr (n > 0)
            return _mm512_srli_epi16(c, n);
        else if constexpr (n < 0)
            return _mm512_slli_epi16(c, -n);
        else
            return c;
    }
    static Codes masked(Codes c, int mask) { return _mm512_and_si512(c, _mm512_set1_epi8(static_cast<char>(mask))); }
    // 0xF8: the first or both of the others
    static Codes merged(Codes a, Codes c, int mask) {
        return _mm512_ternarylogic_epi32(a, c, _mm512_set1_epi8(static_cast<char>(mask)), 0xF8);
    }
    static Codes shuffle(Codes table, Codes index) { return _mm512_shuffle_epi8(table, index); }
    template <int bit>
    static Codes choose(Codes code, Codes clear, Codes set) {
        const __mmask64 is_set = _mm512_test_epi8_mask(code, _mm512_set1_epi8(1 << bit));
        return _mm512_mask_blend_epi8(is_set, clear, set);
    }

    static Dot start(Ints i) { return i; }
    // vpdpbusd: each lane adds four products of unsigned and signed bytes to its 32-bit sum, without saturation
    template <int top, int k>
    static void add_products(Dot& d, Codes c, const int8_t* input) {
        int32_t four;
        std::memcpy(&four, input, sizeof four);
        d = _mm512_dpbusd_epi32(d, c, _mm512_set1_epi32(four));
    }
    static Ints finish(Dot d) { return d; }
    static Ints combined(Ints high, Ints low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low); }

    static Table load_table(const float* from) { return _mm512_loadu_ps(from); }
    // vpermps reads the low four bits of an index
    template <int i>
    static Floats look_up(Table table, Codes c) {
        return _mm512_permutexvar_ps(_mm512_srli_epi32(c, 8 * i), table);
    }
    template <int i, int top>
    static Floats number(Codes c) {
        if constexpr (top < 16) // one instruction less than masking and converting
            return look_up<i>(_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), c);
        else if constexpr (i == 3)
            return _mm512_cvtepi32_ps(_mm512_srli_epi32(c, 24));
        else
            return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(c, 8 * i), _mm512_set1_epi32(255)));
    }

    static void write_numbers(Row row, float zero, float scale, float* to) {
        const __m512 z = _mm512_set1_ps(zero), s = _mm512_set1_ps(scale);
        const __m512 first = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm256_castsi256_si128(row)));
        const __m512 second = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm256_extracti128_si256(row, 1)));
        _mm512_storeu_ps(to, _mm512_mul_ps(_mm512_sub_ps(first, z), s));
        _mm512_storeu_ps(to + 16, _mm512_mul_ps(_mm512_sub_ps(second, z), s));
    }
    static void write_levels(Row row, Table table, float scale, float* to) {
        const __m512 s = _mm512_set1_ps(scale);
        const __m512i first = _mm512_cvtepu8_epi32(_mm256_castsi256_si128(row));
        const __m512i second = _mm512_cvtepu8_epi32(_mm256_extracti128_si256(row, 1));
        _mm512_storeu_ps(to, _mm512_mul_ps(_mm512_permutexvar_ps(first, table), s));
        _mm512_storeu_ps(to + 16, _mm512_mul_ps(_mm512_permutexvar_ps(second, table), s));
    }
};

} // namespace

CodesFunctions codes_avx512(const CodesView& w, InputForm form) {
    return choose_functions<Avx512>(w, form);
}

} // namespace bitpalette
#endif
