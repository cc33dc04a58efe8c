// What kv_products.h needs beyond float lanes, for AVX-512 with VNNI. Included by units compiled for it only.
#pragma once

#include "float_lanes_avx512.h"

namespace bitpalette {
namespace {

struct KvAvx512 : Avx512 {
    using Ints = __m512i;
    static constexpr int tile_rows = 8, tile_sums = 16;
    static constexpr bool signed_bytes = false;

    static Ints all_ints(int32_t i) { return _mm512_set1_epi32(i); }
    static Ints load_ints(const uint32_t* from) { return _mm512_loadu_si512(from); }
    static void store_ints(uint32_t* to, Ints i) { _mm512_storeu_si512(to, i); }
    static void store_ints(int32_t* to, Ints i) { _mm512_storeu_si512(to, i); }
    static Ints load_ints(const int32_t* from) { return _mm512_loadu_si512(from); }
    template <int Shift>
    static Ints right(Ints i) {
        if constexpr (Shift > 0)
            return _mm512_srli_epi32(i, Shift);
        else if constexpr (Shift < 0)
            return _mm512_slli_epi32(i, -Shift);
        else
            return i;
    }
    static Ints both(Ints i, uint32_t mask) { return _mm512_and_si512(i, _mm512_set1_epi32(static_cast<int>(mask))); }
    // vpternlogd: low | (x & mask)
    static Ints with_bits_of(Ints low, Ints x, uint32_t mask) {
        return _mm512_ternarylogic_epi32(x, _mm512_set1_epi32(static_cast<int>(mask)), low, 0xEA);
    }
    static Ints flip_signs(Ints i) { return _mm512_xor_si512(i, _mm512_set1_epi8(-128)); }
    // vpdpbusd: each lane adds four products of unsigned and signed bytes, without saturation
    template <bool Wide>
    static Ints dot(Ints sum, Ints codes, Ints x) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
        return sum;
    }
    static Ints combined(Ints high, Ints low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low); }
    static Floats to_floats(Ints i) { return _mm512_cvtepi32_ps(i); }
    static void store_bytes(int8_t* to, Floats whole) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(whole)));
    }

    // words [4, 64] (columns 0..15) of 16 bytes of 16 rows
    template <bool Paired>
    static void transpose(const uint8_t* rows, int64_t stride, uint32_t* to) {
        transpose_loaded<Paired>([&](int row) { return load128(rows + row * stride); }, to, 4);
    }
    template <bool Paired>
    static void transpose_part(const uint8_t* rows, int64_t stride, int bytes, uint32_t* to) {
        const __mmask16 valid = static_cast<__mmask16>((1u << bytes) - 1);
        transpose_loaded<Paired>([&](int row) { return _mm_maskz_loadu_epi8(valid, rows + row * stride); }, to,
                                 Paired ? (bytes + 7) / 8 * 2 : (bytes + 3) / 4);
    }

    // words [2, columns] of four rows each, of eight rows of `bytes`, in an order of its own
    static void interleave(const uint8_t* rows, int64_t stride, int64_t bytes, int64_t columns, uint32_t* to) {
        int64_t k = 0;
        for (; k + 64 <= bytes; k += 64)
            for (int half = 0; half < 2; ++half) {
                const uint8_t* from = rows + 4 * half * stride + k;
                const auto w = interleaved(load512(from), load512(from + stride), load512(from + 2 * stride),
                                           load512(from + 3 * stride));
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i)
                    store_ints(to + half * columns + k + 16 * i, w.at[i]);
            }
        for (; k + 16 < bytes; k += 32) {
            const auto load = [&](int row) { return half_rows(rows + row * stride + k, 4 * stride, bytes - k); };
            const auto w = interleaved(load(0), load(1), load(2), load(3));
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i)
                store_halves(to + k + 8 * i, columns, w.at[i]);
        }
        if (k < bytes)
            interleave16(rows + k, stride, bytes - k, columns, to + k);
    }

    // low [2, columns]: words of even bytes, then those of odd ones; high [2, columns / 2]: words of the bytes after
    // the first plane's, in the same order
    static void interleave_planes(const uint8_t* rows, int64_t stride, int64_t bytes, int64_t columns, uint32_t* low,
                                  uint32_t* high) {
        const int64_t half = columns / 2;
        const Ints order = _mm512_broadcast_i32x4(even_bytes_first16());
        for (int64_t k = 0; 2 * k < bytes; k += 16) {
            const auto load = [&](int row) {
                const Ints both_rows = half_rows(rows + row * stride + 2 * k, 4 * stride, bytes - 2 * k);
                return _mm512_shuffle_epi8(both_rows, order);
            };
            const auto w = interleaved(load(0), load(1), load(2), load(3));
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i)
                store_halves(low + i / 2 * half + k + i % 2 * 8, columns, w.at[i]);
            interleave16(rows + bytes + k, stride, bytes / 2 - k, half, high + k);
        }
    }

  private:
    struct Four {
        Ints at[4];
    };

    static __m128i load128(const uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }
    static __m256i load256(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
    static Ints load512(const uint8_t* from) { return _mm512_loadu_si512(from); }
    static void store128(uint32_t* to, __m128i i) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), i); }
    static void store256(uint32_t* to, __m256i i) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), i); }
    static void store_halves(uint32_t* to, int64_t apart, Ints i) {
        store256(to, _mm512_castsi512_si256(i));
        store256(to + apart, _mm512_extracti64x4_epi64(i, 1));
    }

    // 32 bytes at `from` and 32 at from + apart, of which only n are there
    static Ints half_rows(const uint8_t* from, int64_t apart, int64_t n) {
        if (n >= 32)
            return _mm512_inserti64x4(_mm512_castsi256_si512(load256(from)), load256(from + apart), 1);
        const __mmask32 valid = static_cast<__mmask32>((1u << n) - 1);
        return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_maskz_loadu_epi8(valid, from)),
                                  _mm256_maskz_loadu_epi8(valid, from + apart), 1);
    }
    static __m256i quarter_rows(const uint8_t* from, int64_t apart, int64_t n) {
        if (n >= 16)
            return _mm256_inserti128_si256(_mm256_castsi128_si256(load128(from)), load128(from + apart), 1);
        const __mmask16 valid = static_cast<__mmask16>((1u << n) - 1);
        return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_maskz_loadu_epi8(valid, from)),
                                       _mm_maskz_loadu_epi8(valid, from + apart), 1);
    }

    // lanes of 16 bytes of four rows: word 4i + j of lane l of byte 16l + 4i + j, at 4l + j of register i
    static Four interleaved(Ints a, Ints b, Ints c, Ints d) {
        const Ints ab = _mm512_unpacklo_epi8(a, b), cd = _mm512_unpacklo_epi8(c, d);
        const Ints ab_high = _mm512_unpackhi_epi8(a, b), cd_high = _mm512_unpackhi_epi8(c, d);
        return {{_mm512_unpacklo_epi16(ab, cd), _mm512_unpackhi_epi16(ab, cd), _mm512_unpacklo_epi16(ab_high, cd_high),
                 _mm512_unpackhi_epi16(ab_high, cd_high)}};
    }

    // up to 16 bytes of eight rows; bytes 8..11 come before 4..7, as in what even_bytes_first16 makes
    static void interleave16(const uint8_t* rows, int64_t stride, int64_t n, int64_t columns, uint32_t* to) {
        const auto load = [&](int row) { return quarter_rows(rows + row * stride, 4 * stride, n); };
        const __m256i a = load(0), b = load(1), c = load(2), d = load(3);
        const __m256i ab = _mm256_unpacklo_epi8(a, b), cd = _mm256_unpacklo_epi8(c, d);
        const __m256i ab_high = _mm256_unpackhi_epi8(a, b), cd_high = _mm256_unpackhi_epi8(c, d);
        const __m256i w[4] = {_mm256_unpacklo_epi16(ab, cd), _mm256_unpacklo_epi16(ab_high, cd_high),
                              _mm256_unpackhi_epi16(ab, cd), _mm256_unpackhi_epi16(ab_high, cd_high)};
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            store128(to + 4 * i, _mm256_castsi256_si128(w[i]));
            store128(to + columns + 4 * i, _mm256_extracti128_si256(w[i], 1));
        }
    }

    static __m128i even_bytes_first16() { return _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15); }
    static __m128i even_bytes_first8() { return _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15); }

    template <bool Paired, class Load>
    static void transpose_loaded(Load&& load, uint32_t* to, int words) {
        Ints r[4]; // lane l of register i: row 4l + i
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            r[i] = _mm512_castsi128_si512(load(i));
            r[i] = _mm512_inserti32x4(r[i], load(4 + i), 1);
            r[i] = _mm512_inserti32x4(r[i], load(8 + i), 2);
            r[i] = _mm512_inserti32x4(r[i], load(12 + i), 3);
            if (Paired)
                r[i] = _mm512_shuffle_epi8(r[i], _mm512_broadcast_i32x4(even_bytes_first8()));
        }
        const Ints a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpacklo_epi32(r[2], r[3]);
        const Ints c = _mm512_unpackhi_epi32(r[0], r[1]), d = _mm512_unpackhi_epi32(r[2], r[3]);
        store_ints(to, _mm512_unpacklo_epi64(a, b));
        if (words > 1)
            store_ints(to + 64, _mm512_unpackhi_epi64(a, b));
        if (words > 2)
            store_ints(to + 128, _mm512_unpacklo_epi64(c, d));
        if (words > 3)
            store_ints(to + 192, _mm512_unpackhi_epi64(c, d));
    }
};

} // namespace
} // namespace bitpalette
