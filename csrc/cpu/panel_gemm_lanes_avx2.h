// The vocabulary of panels for AVX2, for the units of AVX2 and of what adds to it.
#pragma once

#include <cstring>

#include <immintrin.h>

#include "panel_gemm_unit.h"

namespace bitpalette {
namespace {

struct Avx2 {
    using Floats = __m256;
    using Ints = __m256i;
    static constexpr int lanes = 8, blocks = 1, most_tokens = 6;
    // vpmaddubsw saturates at 16 bits: four of its sums fit, at 2 * 31 * 128 each
    static constexpr int top_byte = 31, chain = 4;

    static Floats all(float value) { return _mm256_set1_ps(value); }
    static Floats load(const float* from) { return _mm256_loadu_ps(from); }
    static void store(float* to, Floats f) { _mm256_storeu_ps(to, f); }
    static Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
    static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    static Floats to_floats(Ints i) { return _mm256_cvtepi32_ps(i); }
    static Floats load_float_words(const uint8_t* from) { return _mm256_castsi256_ps(load_words(from)); }
    static Floats all_float_words(const uint8_t* from) { return _mm256_castsi256_ps(all_words(from)); }

    static Ints all_ints(int32_t value) { return _mm256_set1_epi32(value); }
    static Ints load_words(const uint8_t* from) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(from)); }
    static Ints all_words(const uint8_t* from) {
        int32_t word;
        std::memcpy(&word, from, sizeof word);
        return _mm256_set1_epi32(word);
    }
    static void add_products(Ints& sum, Ints w, Ints x, Shorts) {
        sum = kept(_mm256_add_epi32(sum, _mm256_madd_epi16(w, x)));
    }

    static Ints byte_pairs(Ints w, Ints x) { return _mm256_maddubs_epi16(w, x); }
    static Ints add_shorts(Ints a, Ints b) { return _mm256_add_epi16(a, b); }
    static Ints add_pairs(Ints sum, Ints pairs) {
        return kept(_mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
    }

    static Ints minus(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
    static Ints lowest(Ints words, Bytes) { return _mm256_and_si256(words, _mm256_set1_epi32(255)); }
    static Ints lowest(Ints words, Shorts) { return _mm256_srai_epi32(_mm256_slli_epi32(words, 16), 16); }
    static Ints next(Ints words, Bytes) { return _mm256_srli_epi32(words, 8); }
    static Ints next(Ints words, Shorts) { return _mm256_srli_epi32(words, 16); }

    // two 8 x 8 words: pairs of rows, then fours, then halves of registers
    static void interleave(const uint8_t* const (&rows)[panel_rows], int64_t n, uint8_t* to) {
        for (int64_t i = 0; i < n; i += 8, to += 8 * panel_step_bytes)
            for (int half = 0; half < 2; ++half) {
                __m256i a[8], b[8];
                for (int r = 0; r < 8; ++r)
                    a[r] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[8 * half + r] + 4 * i));
                for (int r = 0; r < 8; r += 2) {
                    b[r] = _mm256_unpacklo_epi32(a[r], a[r + 1]);
                    b[r + 1] = _mm256_unpackhi_epi32(a[r], a[r + 1]);
                }
                for (int r = 0; r < 8; r += 4) {
                    a[r] = _mm256_unpacklo_epi64(b[r], b[r + 2]);
                    a[r + 1] = _mm256_unpackhi_epi64(b[r], b[r + 2]);
                    a[r + 2] = _mm256_unpacklo_epi64(b[r + 1], b[r + 3]);
                    a[r + 3] = _mm256_unpackhi_epi64(b[r + 1], b[r + 3]);
                }
                for (int c = 0; c < 4; ++c) {
                    store_half(to, c, half, _mm256_permute2x128_si256(a[c], a[4 + c], 0x20));
                    store_half(to, 4 + c, half, _mm256_permute2x128_si256(a[c], a[4 + c], 0x31));
                }
            }
    }
    static void widen(const uint8_t* from, int64_t n, uint8_t* to) {
        const __m256i first =
            _mm256_broadcastsi128_si256(_mm_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1));
        const __m256i second =
            _mm256_broadcastsi128_si256(_mm_setr_epi8(2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15, -1));
        for (int64_t i = 0; i < n; ++i)
            for (int half = 0; half < 2; ++half) {
                const __m256i bytes = load_words(from + i * panel_step_bytes + 32 * half);
                store_half(to, 2 * i, half, _mm256_shuffle_epi8(bytes, first));
                store_half(to, 2 * i + 1, half, _mm256_shuffle_epi8(bytes, second));
            }
    }

  private:
    // Without this gcc 12 (its partial redundancy elimination) has every sum twice, one of them on the stack.
    static Ints kept(Ints i) {
        asm("" : "+x"(i));
        return i;
    }
    static void store_half(uint8_t* to, int64_t step, int half, __m256i words) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + step * panel_step_bytes + 32 * half), words);
    }
};

} // namespace
} // namespace bitpalette
