// What kv_products.h needs beyond float lanes, for AVX-512 with VNNI. Included by units compiled for it only.
#pragma once

#include "float_lanes_avx512.h"

namespace bitpalette {
namespace {

struct KvAvx512 : Avx512 {
    using Ints = __m512i;
    static constexpr int tile_rows = 4, tile_columns = 4;
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
    static Ints either(Ints a, Ints b) { return _mm512_or_si512(a, b); }
    static Ints flip_signs(Ints i) { return _mm512_xor_si512(i, _mm512_set1_epi8(-128)); }
    // vpdpbusd: each lane adds four products of unsigned and signed bytes, without saturation
    template <bool Wide>
    static Ints dot(Ints sum, Ints codes, Ints x) {
        return _mm512_dpbusd_epi32(sum, codes, x);
    }
    static Ints combined(Ints high, Ints low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low); }
    static Floats to_floats(Ints i) { return _mm512_cvtepi32_ps(i); }
    static void store_bytes(int8_t* to, Floats whole) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(whole)));
    }

    // words [4, 64] (columns 0..15) of 16 bytes of 16 rows
    static void transpose(const uint8_t* rows, int64_t stride, uint32_t* to) {
        transpose_loaded([&](int row) { return load128(rows + row * stride); }, to, 4);
    }
    static void transpose_part(const uint8_t* rows, int64_t stride, int bytes, uint32_t* to) {
        const __mmask16 valid = static_cast<__mmask16>((1u << bytes) - 1);
        transpose_loaded([&](int row) { return _mm_maskz_loadu_epi8(valid, rows + row * stride); }, to,
                         (bytes + 3) / 4);
    }

    // words [bytes in steps of 16] of four rows, in an order of its own
    static void interleave(const uint8_t* rows, int64_t stride, int64_t bytes, uint32_t* to) {
        for (; bytes >= 64; rows += 64, bytes -= 64, to += 64) {
            const Ints a = load512(rows), b = load512(rows + stride), c = load512(rows + 2 * stride),
                       d = load512(rows + 3 * stride);
            const Ints ab = _mm512_unpacklo_epi8(a, b), cd = _mm512_unpacklo_epi8(c, d);
            const Ints ab_high = _mm512_unpackhi_epi8(a, b), cd_high = _mm512_unpackhi_epi8(c, d);
            store_ints(to, _mm512_unpacklo_epi16(ab, cd));
            store_ints(to + 16, _mm512_unpackhi_epi16(ab, cd));
            store_ints(to + 32, _mm512_unpacklo_epi16(ab_high, cd_high));
            store_ints(to + 48, _mm512_unpackhi_epi16(ab_high, cd_high));
        }
        for (; bytes > 16; rows += 32, bytes -= 32, to += 32) {
            const __mmask32 valid = bytes >= 32 ? ~__mmask32{0} : static_cast<__mmask32>((1u << bytes) - 1);
            const auto load = [&](int row) { return _mm256_maskz_loadu_epi8(valid, rows + row * stride); };
            const __m256i a = load(0), b = load(1), c = load(2), d = load(3);
            const __m256i ab = _mm256_unpacklo_epi8(a, b), cd = _mm256_unpacklo_epi8(c, d);
            const __m256i ab_high = _mm256_unpackhi_epi8(a, b), cd_high = _mm256_unpackhi_epi8(c, d);
            store256(to, _mm256_unpacklo_epi16(ab, cd));
            store256(to + 8, _mm256_unpackhi_epi16(ab, cd));
            store256(to + 16, _mm256_unpacklo_epi16(ab_high, cd_high));
            store256(to + 24, _mm256_unpackhi_epi16(ab_high, cd_high));
        }
        if (bytes > 0) {
            const __mmask16 valid = static_cast<__mmask16>((1u << bytes) - 1);
            const auto load = [&](int row) { return _mm_maskz_loadu_epi8(valid, rows + row * stride); };
            const __m128i a = load(0), b = load(1), c = load(2), d = load(3);
            const __m128i ab = _mm_unpacklo_epi8(a, b), cd = _mm_unpacklo_epi8(c, d);
            const __m128i ab_high = _mm_unpackhi_epi8(a, b), cd_high = _mm_unpackhi_epi8(c, d);
            store128(to, _mm_unpacklo_epi16(ab, cd));
            store128(to + 4, _mm_unpackhi_epi16(ab, cd));
            store128(to + 8, _mm_unpacklo_epi16(ab_high, cd_high));
            store128(to + 12, _mm_unpackhi_epi16(ab_high, cd_high));
        }
    }

    // the low and the high four bits of each byte as bytes of their own
    static void nibbles(const uint8_t* from, int64_t bytes, uint8_t* to) {
        for (int64_t i = 0; i < bytes; i += 32) {
            const int64_t n = bytes - i;
            const __mmask32 valid = n >= 32 ? ~__mmask32{0} : static_cast<__mmask32>((1u << n) - 1);
            const Ints x = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(valid, from + i));
            const Ints spread = both(either(x, _mm512_slli_epi16(x, 4)), 0x0F0F0F0F);
            const __mmask64 stored = n >= 32 ? ~__mmask64{0} : (__mmask64{1} << 2 * n) - 1;
            _mm512_mask_storeu_epi8(to + 2 * i, stored, spread);
        }
    }

  private:
    static __m128i load128(const uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }
    static Ints load512(const uint8_t* from) { return _mm512_loadu_si512(from); }
    static void store128(uint32_t* to, __m128i i) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), i); }
    static void store256(uint32_t* to, __m256i i) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), i); }

    template <class Load>
    static void transpose_loaded(Load&& load, uint32_t* to, int words) {
        Ints r[4]; // lane l of register i: row 4l + i
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            r[i] = _mm512_castsi128_si512(load(i));
            r[i] = _mm512_inserti32x4(r[i], load(4 + i), 1);
            r[i] = _mm512_inserti32x4(r[i], load(8 + i), 2);
            r[i] = _mm512_inserti32x4(r[i], load(12 + i), 3);
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
