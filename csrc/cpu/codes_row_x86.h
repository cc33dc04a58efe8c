// Tables and the codes of one row out of a tile's planes, for AVX2 and what includes it.
#pragma once

#include <cstring>

#include <immintrin.h>

#include "codes_unit.h"

namespace bitpalette {
namespace {

struct RowX86 {
    using Row = __m256i; // 32 bytes, a column each

    // Products take unsigned bytes, which a table's are; table_offset: how far they are above the levels they stand
    // for.
    static constexpr int table_offset = 128;
    static constexpr bool shifts_bytes = false;
    template <class Codes>
    static Codes table_bytes(Codes c) {
        return c;
    }

    // at: the row's four bytes in the first register of a tile.
    template <int bits>
    static __m256i row_codes(const uint8_t* at) {
        if constexpr (bits == 8) {
            return _mm256_setr_epi32(four(at, 0), four(at, 1), four(at, 2), four(at, 3), four(at, 4), four(at, 5),
                                     four(at, 6), four(at, 7));
        } else {
            __m256i codes = _mm256_setzero_si256();
            if constexpr (bits & 4) {
                const __m128i plane = _mm_setr_epi32(four(at, 0), four(at, 1), four(at, 2), four(at, 3));
                codes = quads(plane, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3),
                              _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4), 15);
            }
            if constexpr (bits & 2) {
                const int first = bits & 4;
                const __m128i plane = _mm_setr_epi32(four(at, first), four(at, first + 1), 0, 0);
                const __m256i pairs = quads(plane, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1),
                                            _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6), 3);
                codes = _mm256_or_si256(codes, _mm256_slli_epi32(pairs, first));
            }
            if constexpr (bits & 1) {
                const __m128i plane = _mm_cvtsi32_si128(four(at, bits - 1));
                const __m256i singles =
                    quads(plane, _mm256_setzero_si256(), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), 1);
                codes = _mm256_or_si256(codes, _mm256_slli_epi32(singles, bits - 1));
            }
            return codes;
        }
    }

  private:
    static int32_t four(const uint8_t* at, int index) {
        int32_t bytes;
        std::memcpy(&bytes, at + codes_plane_bytes * index, sizeof bytes);
        return bytes;
    }
    // quad k = register index[k] of the plane, shifted right by shift[k], masked
    static __m256i quads(__m128i plane, __m256i index, __m256i shift, char mask) {
        const __m256i spread = _mm256_permutevar8x32_epi32(_mm256_castsi128_si256(plane), index);
        return _mm256_and_si256(_mm256_srlv_epi32(spread, shift), _mm256_set1_epi8(mask));
    }
};

} // namespace
} // namespace bitpalette
