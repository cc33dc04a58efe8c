// What kv_products.h needs beyond float lanes, for AVX2 and for what adds to it. Included by units compiled for it
// only.
#pragma once

#include "float_lanes_avx2.h"

namespace bitpalette {
namespace {

struct KvAvx2 : Avx2 {
    using Ints = __m256i;
    static constexpr int tile_rows = 2, tile_columns = 4;
    static constexpr bool signed_bytes = false;

    static Ints all_ints(int32_t i) { return _mm256_set1_epi32(i); }
    static Ints load_ints(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
    static void store_ints(void* to, Ints i) { _mm256_storeu_si256(static_cast<__m256i*>(to), i); }
    template <int Shift>
    static Ints right(Ints i) {
        if constexpr (Shift > 0)
            return _mm256_srli_epi32(i, Shift);
        else if constexpr (Shift < 0)
            return _mm256_slli_epi32(i, -Shift);
        else
            return i;
    }
    static Ints both(Ints i, uint32_t mask) { return _mm256_and_si256(i, _mm256_set1_epi32(static_cast<int>(mask))); }
    static Ints either(Ints a, Ints b) { return _mm256_or_si256(a, b); }
    static Ints flip_signs(Ints i) { return _mm256_xor_si256(i, _mm256_set1_epi8(-128)); }
    // vpmaddubsw adds two products in 16 bits, which saturate with codes above 128: those are widened first
    template <bool Wide>
    static Ints dot(Ints sum, Ints codes, Ints x) {
        if constexpr (Wide) {
            const Ints even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), odd = _mm256_srai_epi16(x, 8);
            const Ints low = _mm256_madd_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(255)), even);
            const Ints high = _mm256_madd_epi16(_mm256_srli_epi16(codes, 8), odd);
            return _mm256_add_epi32(sum, _mm256_add_epi32(low, high));
        } else {
            const Ints pairs = _mm256_maddubs_epi16(codes, x);
            return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        }
    }
    static Ints combined(Ints high, Ints low) { return _mm256_add_epi32(_mm256_slli_epi32(high, 8), low); }
    static Floats to_floats(Ints i) { return _mm256_cvtepi32_ps(i); }
    static void store_bytes(int8_t* to, Floats whole) {
        const Ints i = _mm256_cvtps_epi32(whole);
        const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(shorts, shorts));
    }

    // words [4, 64] (columns 0..7) of 16 bytes of 8 rows
    static void transpose(const uint8_t* rows, int64_t stride, uint32_t* to) {
        Ints r[4]; // half h of register i: row 4h + i
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
            r[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(load128(rows + i * stride)),
                                           load128(rows + (4 + i) * stride), 1);
        const Ints a = _mm256_unpacklo_epi32(r[0], r[1]), b = _mm256_unpacklo_epi32(r[2], r[3]);
        const Ints c = _mm256_unpackhi_epi32(r[0], r[1]), d = _mm256_unpackhi_epi32(r[2], r[3]);
        store_ints(to, _mm256_unpacklo_epi64(a, b));
        store_ints(to + 64, _mm256_unpackhi_epi64(a, b));
        store_ints(to + 128, _mm256_unpacklo_epi64(c, d));
        store_ints(to + 192, _mm256_unpackhi_epi64(c, d));
    }
    static void transpose_part(const uint8_t* rows, int64_t stride, int bytes, uint32_t* to) {
        uint32_t part[8][4] = {};
        for (int row = 0; row < 8; ++row)
            std::memcpy(part[row], rows + row * stride, static_cast<size_t>(bytes));
        for (int word = 0; 4 * word < bytes; ++word)
            for (int row = 0; row < 8; ++row)
                to[64 * word + row] = part[row][word];
    }

    // words [bytes in steps of 16] of four rows, in an order of its own
    static void interleave(const uint8_t* rows, int64_t stride, int64_t bytes, uint32_t* to) {
        for (; bytes >= 32; rows += 32, bytes -= 32, to += 32) {
            const Ints a = load_ints(rows), b = load_ints(rows + stride), c = load_ints(rows + 2 * stride),
                       d = load_ints(rows + 3 * stride);
            const Ints ab = _mm256_unpacklo_epi8(a, b), cd = _mm256_unpacklo_epi8(c, d);
            const Ints ab_high = _mm256_unpackhi_epi8(a, b), cd_high = _mm256_unpackhi_epi8(c, d);
            store_ints(to, _mm256_unpacklo_epi16(ab, cd));
            store_ints(to + 8, _mm256_unpackhi_epi16(ab, cd));
            store_ints(to + 16, _mm256_unpacklo_epi16(ab_high, cd_high));
            store_ints(to + 24, _mm256_unpackhi_epi16(ab_high, cd_high));
        }
        for (; bytes >= 16; rows += 16, bytes -= 16, to += 16)
            interleave128(load128(rows), load128(rows + stride), load128(rows + 2 * stride), load128(rows + 3 * stride),
                          to);
        if (bytes > 0) {
            uint8_t part[4][16] = {};
            for (int row = 0; row < 4; ++row)
                std::memcpy(part[row], rows + row * stride, static_cast<size_t>(bytes));
            interleave128(load128(part[0]), load128(part[1]), load128(part[2]), load128(part[3]), to);
        }
    }

    // the low and the high four bits of each byte as bytes of their own
    static void nibbles(const uint8_t* from, int64_t bytes, uint8_t* to) {
        int64_t i = 0;
        for (; i + 16 <= bytes; i += 16) {
            const Ints x = _mm256_cvtepu8_epi16(load128(from + i));
            store_ints(to + 2 * i, both(either(x, _mm256_slli_epi16(x, 4)), 0x0F0F0F0F));
        }
        for (; i < bytes; ++i) {
            to[2 * i] = from[i] & 15;
            to[2 * i + 1] = from[i] >> 4;
        }
    }

  private:
    static __m128i load128(const uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }
    static void store128(uint32_t* to, __m128i i) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), i); }
    static void interleave128(__m128i a, __m128i b, __m128i c, __m128i d, uint32_t* to) {
        const __m128i ab = _mm_unpacklo_epi8(a, b), cd = _mm_unpacklo_epi8(c, d);
        const __m128i ab_high = _mm_unpackhi_epi8(a, b), cd_high = _mm_unpackhi_epi8(c, d);
        store128(to, _mm_unpacklo_epi16(ab, cd));
        store128(to + 4, _mm_unpackhi_epi16(ab, cd));
        store128(to + 8, _mm_unpacklo_epi16(ab_high, cd_high));
        store128(to + 12, _mm_unpackhi_epi16(ab_high, cd_high));
    }
};

} // namespace
} // namespace bitpalette
