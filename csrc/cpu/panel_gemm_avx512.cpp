// The panel kernel for AVX-512 with VNNI: two blocks of 16 rows times 12 tokens take 24 of 32 registers.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // gcc 12's own avx512fintrin.h, hundreds of lines of it
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include "panel_gemm_body.h"

#if BITPALETTE_X86
#include <immintrin.h>

namespace bitpalette {
namespace {

struct Avx512 {
    using Floats = __m512;
    using Ints = __m512i;
    static constexpr int lanes = 16, blocks = 2, most_tokens = 12;
    static constexpr int top_byte = 255, chain = 1;

    static Floats all(float value) { return _mm512_set1_ps(value); }
    static Floats load(const float* from) { return _mm512_loadu_ps(from); }
    static void store(float* to, Floats f) { _mm512_storeu_ps(to, f); }
    static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static Floats to_floats(Ints i) { return _mm512_cvtepi32_ps(i); }
    static Floats load_float_words(const uint8_t* from) { return _mm512_load_ps(from); }
    static Floats all_float_words(const uint8_t* from) { return _mm512_castsi512_ps(all_words(from)); }

    static Ints all_ints(int32_t value) { return _mm512_set1_epi32(value); }
    static Ints load_words(const uint8_t* from) { return _mm512_load_si512(from); }
    static Ints all_words(const uint8_t* from) {
        int32_t word;
        std::memcpy(&word, from, sizeof word);
        return _mm512_set1_epi32(word);
    }
    // vpdpbusd: each lane adds four products of unsigned and signed bytes to its 32-bit sum, without saturation
    static void add_products(Ints& sum, Ints w, Ints x, Bytes) { sum = kept(_mm512_dpbusd_epi32(sum, w, x)); }
    static void add_products(Ints& sum, Ints w, Ints x, Shorts) { sum = kept(_mm512_dpwssd_epi32(sum, w, x)); }

    static Ints minus(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
    static Ints lowest(Ints words, Bytes) { return _mm512_and_si512(words, _mm512_set1_epi32(255)); }
    static Ints lowest(Ints words, Shorts) { return _mm512_srai_epi32(_mm512_slli_epi32(words, 16), 16); }
    static Ints next(Ints words, Bytes) { return _mm512_srli_epi32(words, 8); }
    static Ints next(Ints words, Shorts) { return _mm512_srli_epi32(words, 16); }

    // 16 x 16 words: pairs of rows, then fours, by halves and quarters of registers
    static void interleave(const uint8_t* const (&rows)[panel_rows], int64_t n, uint8_t* to) {
        for (int64_t i = 0; i < n; i += 16, to += 16 * panel_step_bytes) {
            __m512i a[16], b[16];
#pragma GCC unroll 16
            for (int r = 0; r < 16; ++r)
                a[r] = _mm512_loadu_si512(rows[r] + 4 * i);
#pragma GCC unroll 8
            for (int r = 0; r < 16; r += 2) {
                b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
                b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
            }
#pragma GCC unroll 4
            for (int r = 0; r < 16; r += 4) { // a[r + c]: column c of each quarter, of rows r..r+3
                a[r] = _mm512_unpacklo_epi64(b[r], b[r + 2]);
                a[r + 1] = _mm512_unpackhi_epi64(b[r], b[r + 2]);
                a[r + 2] = _mm512_unpacklo_epi64(b[r + 1], b[r + 3]);
                a[r + 3] = _mm512_unpackhi_epi64(b[r + 1], b[r + 3]);
            }
#pragma GCC unroll 4
            for (int c = 0; c < 4; ++c) {
                const __m512i low = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88);
                const __m512i low_odd = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xDD);
                const __m512i high = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
                const __m512i high_odd = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xDD);
                // low: quarters 0 and 2 of rows 0..3, then of rows 4..7
                store_step(to, c, _mm512_shuffle_i32x4(low, high, 0x88));
                store_step(to, 8 + c, _mm512_shuffle_i32x4(low, high, 0xDD));
                store_step(to, 4 + c, _mm512_shuffle_i32x4(low_odd, high_odd, 0x88));
                store_step(to, 12 + c, _mm512_shuffle_i32x4(low_odd, high_odd, 0xDD));
            }
        }
    }
    static void widen(const uint8_t* from, int64_t n, uint8_t* to) {
        const __m512i first =
            _mm512_broadcast_i32x4(_mm_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1));
        const __m512i second =
            _mm512_broadcast_i32x4(_mm_setr_epi8(2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15, -1));
        for (int64_t i = 0; i < n; ++i) {
            const __m512i bytes = _mm512_load_si512(from + i * panel_step_bytes);
            store_step(to, 2 * i, _mm512_shuffle_epi8(bytes, first));
            store_step(to, 2 * i + 1, _mm512_shuffle_epi8(bytes, second));
        }
    }

  private:
    // Without this gcc 12 (its partial redundancy elimination) has every sum twice, one of them on the stack.
    static Ints kept(Ints i) {
        asm("" : "+v"(i));
        return i;
    }
    static void store_step(uint8_t* to, int64_t step, __m512i words) {
        _mm512_store_si512(to + step * panel_step_bytes, words);
    }
};

} // namespace

const PanelUnit panel_avx512 = panel_of<Avx512>();

} // namespace bitpalette
#endif
