// What kv_products.h needs beyond float lanes, for AVX2 and for what adds to it. Included by units compiled for it
// only.
#pragma once

#include "float_lanes_avx2.h"

namespace bitpalette {
namespace {

struct KvAvx2 : Avx2 {
    using Ints = __m256i;
    static constexpr int tile_rows = 2, tile_sums = 8;
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
    static Ints with_bits_of(Ints low, Ints x, uint32_t mask) { return _mm256_or_si256(low, both(x, mask)); }
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

    // words [4, 64] (columns 0..7) of 16 bytes of 8 rows; paired: of the even bytes of eight, then of the odd ones
    template <bool Paired>
    static void transpose(const uint8_t* rows, int64_t stride, uint32_t* to) {
        Ints w[4];
        transposed<Paired>(rows, stride, w);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
            store_ints(to + 64 * i, w[i]);
    }
    template <bool Paired>
    static void transpose_part(const uint8_t* rows, int64_t stride, int bytes, uint32_t* to) {
        uint8_t part[8][16] = {};
        for (int row = 0; row < 8; ++row)
            std::memcpy(part[row], rows + row * stride, static_cast<size_t>(bytes));
        Ints w[4];
        transposed<Paired>(part[0], 16, w);
        for (int i = 0; i < (Paired ? (bytes + 7) / 8 * 2 : (bytes + 3) / 4); ++i)
            store_ints(to + 64 * i, w[i]);
    }

    // words [2, columns] of four rows each, of eight rows of `bytes`, in an order of its own
    static void interleave(const uint8_t* rows, int64_t stride, int64_t bytes, int64_t columns, uint32_t* to) {
        for (int half = 0; half < 2; ++half) {
            const uint8_t* from = rows + 4 * half * stride;
            uint32_t* words = to + half * columns;
            int64_t k = 0;
            for (; k + 32 <= bytes; k += 32) {
                const auto load = [&](int row) { return load_ints(from + row * stride + k); };
                Ints w[4];
                interleaved(load(0), load(1), load(2), load(3), w);
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i)
                    store_ints(words + k + 8 * i, w[i]);
            }
            for (; k < bytes; k += 16)
                interleave16(from + k, stride, bytes - k, words + k);
        }
    }

    // low [2, columns]: words of even bytes, then those of odd ones; high [2, columns / 2]: words of the bytes after
    // the first plane's, in the same order
    static void interleave_planes(const uint8_t* rows, int64_t stride, int64_t bytes, int64_t columns, uint32_t* low,
                                  uint32_t* high) {
        const Ints order =
            _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
        const int64_t columns_high = columns / 2;
        for (int half = 0; half < 2; ++half)
            for (int64_t k = 0; 2 * k < bytes; k += 16) {
                const uint8_t* from = rows + 4 * half * stride;
                const auto load = [&](int row) {
                    const uint8_t* at = from + row * stride + 2 * k;
                    uint8_t part[32] = {};
                    if (bytes - 2 * k < 32)
                        at = static_cast<const uint8_t*>(
                            std::memcpy(part, at, static_cast<size_t>(bytes - 2 * k)));
                    return _mm256_shuffle_epi8(load_ints(at), order);
                };
                Ints w[4];
                interleaved(load(0), load(1), load(2), load(3), w);
                uint32_t* to = low + half * columns + k;
                store_ints(to, w[0]);
                store_ints(to + 8, w[1]);
                store_ints(to + columns_high, w[2]);
                store_ints(to + columns_high + 8, w[3]);
                interleave16(from + bytes + k, stride, bytes / 2 - k, high + half * columns_high + k);
            }
    }

  private:
    static __m128i load128(const uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }
    static void store128(uint32_t* to, __m128i i) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), i); }

    template <bool Paired>
    static void transposed(const uint8_t* rows, int64_t stride, Ints* w) {
        Ints r[4]; // half h of register i: row 4h + i
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            r[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(load128(rows + i * stride)),
                                           load128(rows + (4 + i) * stride), 1);
            if (Paired)
                r[i] = _mm256_shuffle_epi8(r[i], _mm256_broadcastsi128_si256(_mm_setr_epi8(
                                                     0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15)));
        }
        const Ints a = _mm256_unpacklo_epi32(r[0], r[1]), b = _mm256_unpacklo_epi32(r[2], r[3]);
        const Ints c = _mm256_unpackhi_epi32(r[0], r[1]), d = _mm256_unpackhi_epi32(r[2], r[3]);
        w[0] = _mm256_unpacklo_epi64(a, b);
        w[1] = _mm256_unpackhi_epi64(a, b);
        w[2] = _mm256_unpacklo_epi64(c, d);
        w[3] = _mm256_unpackhi_epi64(c, d);
    }

    // lanes of 16 bytes of four rows: byte 16l + 4i + j at 4l + j of w[i]
    static void interleaved(Ints a, Ints b, Ints c, Ints d, Ints* w) {
        const Ints ab = _mm256_unpacklo_epi8(a, b), cd = _mm256_unpacklo_epi8(c, d);
        const Ints ab_high = _mm256_unpackhi_epi8(a, b), cd_high = _mm256_unpackhi_epi8(c, d);
        w[0] = _mm256_unpacklo_epi16(ab, cd);
        w[1] = _mm256_unpackhi_epi16(ab, cd);
        w[2] = _mm256_unpacklo_epi16(ab_high, cd_high);
        w[3] = _mm256_unpackhi_epi16(ab_high, cd_high);
    }

    // up to 16 bytes of four rows; bytes 8..11 come before 4..7, as in words of two planes
    static void interleave16(const uint8_t* rows, int64_t stride, int64_t n, uint32_t* to) {
        uint8_t part[4][16] = {};
        if (n < 16) {
            for (int row = 0; row < 4; ++row)
                std::memcpy(part[row], rows + row * stride, static_cast<size_t>(n));
            rows = part[0], stride = 16;
        }
        const __m128i a = load128(rows), b = load128(rows + stride), c = load128(rows + 2 * stride),
                      d = load128(rows + 3 * stride);
        const __m128i ab = _mm_unpacklo_epi8(a, b), cd = _mm_unpacklo_epi8(c, d);
        const __m128i ab_high = _mm_unpackhi_epi8(a, b), cd_high = _mm_unpackhi_epi8(c, d);
        store128(to, _mm_unpacklo_epi16(ab, cd));
        store128(to + 4, _mm_unpacklo_epi16(ab_high, cd_high));
        store128(to + 8, _mm_unpackhi_epi16(ab, cd));
        store128(to + 12, _mm_unpackhi_epi16(ab_high, cd_high));
    }
};

} // namespace
} // namespace bitpalette
