// The vocabulary of code planes for AVX2, for the units of AVX2 and of what adds to it.
#pragma once

#include "codes_row_x86.h"

namespace bitpalette {
namespace {

struct Avx2 : RowX86 {
    struct Floats {
        __m256 a, b; // rows 0..7, 8..15
    };
    struct Ints {
        __m256i a, b;
    };
    using Codes = Ints;
    using Table = Floats;
    struct Dot {
        Ints sums;
        Ints pairs; // 16-bit sums of products
    };
    static constexpr int most_tokens = 2; // 4 need 32 registers of the 16 there are
    static constexpr int most_sums = 2;

    static Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static Floats all(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
    static Floats load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
    static void store(float* to, Floats f) {
        _mm256_storeu_ps(to, f.a);
        _mm256_storeu_ps(to + 8, f.b);
    }
    static Floats load_halves(const uint16_t* from) {
        return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))),
                _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 8)))};
    }
    static Floats scaled(Floats f, float by) { return multiply(f, all(by)); }
    static Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
    static Floats multiply(Floats a, Floats b) { return {_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
    static Floats multiply_add(Floats a, Floats b, Floats c) {
        return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)};
    }
    static float total(Floats f) {
        const __m256 eight = _mm256_add_ps(f.a, f.b);
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
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
    static Codes load_sixteen(const uint8_t* from) {
        const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        return {both, both};
    }
    template <int n>
    static Codes shift(Codes c) {
        if constexpr (n > 0)
            return {_mm256_srli_epi16(c.a, n), _mm256_srli_epi16(c.b, n)};
        else if constexpr (n < 0)
            return {_mm256_slli_epi16(c.a, -n), _mm256_slli_epi16(c.b, -n)};
        else
            return c;
    }
    static Codes masked(Codes c, int mask) {
        const __m256i bits = _mm256_set1_epi8(static_cast<char>(mask));
        return {_mm256_and_si256(c.a, bits), _mm256_and_si256(c.b, bits)};
    }
    static Codes merged(Codes a, Codes c, int mask) {
        const Codes part = masked(c, mask);
        return {_mm256_or_si256(a.a, part.a), _mm256_or_si256(a.b, part.b)};
    }
    static Codes shuffle(Codes table, Codes index) {
        return {_mm256_shuffle_epi8(table.a, index.a), _mm256_shuffle_epi8(table.b, index.b)};
    }
    // vpblendvb reads a byte's highest bit
    template <int bit>
    static Codes choose(Codes code, Codes clear, Codes set) {
        const Codes top = shift<bit - 7>(code);
        return {_mm256_blendv_epi8(clear.a, set.a, top.a), _mm256_blendv_epi8(clear.b, set.b, top.b)};
    }

    static Dot start(Ints i) { return {i, {_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
    // vpmaddubsw saturates at 16 bits: `chain` of its sums fit, at 2 * top * 128 each. Where not even one does, even
    // and odd bytes are widened and multiplied apart.
    template <int top, int k>
    static void add_products(Dot& d, Codes c, const int8_t* input) {
        constexpr int chain = 32767 / (256 * top);
        int32_t four;
        std::memcpy(&four, input, sizeof four);
        const __m256i x = _mm256_set1_epi32(four);
        if constexpr (chain == 0) {
            const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), odd = _mm256_srai_epi16(x, 8);
            d.sums.a = add_wide(d.sums.a, c.a, even, odd);
            d.sums.b = add_wide(d.sums.b, c.b, even, odd);
        } else {
            const __m256i a = _mm256_maddubs_epi16(c.a, x), b = _mm256_maddubs_epi16(c.b, x);
            d.pairs =
                k % chain == 0 ? Ints{a, b} : Ints{_mm256_add_epi16(d.pairs.a, a), _mm256_add_epi16(d.pairs.b, b)};
            if constexpr ((k + 1) % chain == 0 || k == 7) {
                const __m256i ones = _mm256_set1_epi16(1);
                d.sums.a = _mm256_add_epi32(d.sums.a, _mm256_madd_epi16(d.pairs.a, ones));
                d.sums.b = _mm256_add_epi32(d.sums.b, _mm256_madd_epi16(d.pairs.b, ones));
            }
        }
    }
    static Ints finish(const Dot& d) { return d.sums; }
    static Ints combined(Ints high, Ints low) {
        return {_mm256_add_epi32(_mm256_slli_epi32(high.a, 8), low.a),
                _mm256_add_epi32(_mm256_slli_epi32(high.b, 8), low.b)};
    }

    static Table load_table(const float* from) { return load(from); }
    template <int i>
    static Floats look_up(Table table, Codes c) {
        return {level(table, _mm256_srli_epi32(c.a, 8 * i)), level(table, _mm256_srli_epi32(c.b, 8 * i))};
    }
    template <int i, int top>
    static Floats number(Codes c) {
        const __m256i byte = _mm256_set1_epi32(255);
        return to_floats({_mm256_and_si256(_mm256_srli_epi32(c.a, 8 * i), byte),
                          _mm256_and_si256(_mm256_srli_epi32(c.b, 8 * i), byte)});
    }

    static void write_numbers(Row row, float zero, float scale, float* to) {
        for (int half = 0; half < 2; ++half) {
            const __m128i bytes = half == 0 ? _mm256_castsi256_si128(row) : _mm256_extracti128_si256(row, 1);
            const Floats codes =
                to_floats({_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))});
            const __m256 z = _mm256_set1_ps(zero);
            store(to + 16 * half, scaled({_mm256_sub_ps(codes.a, z), _mm256_sub_ps(codes.b, z)}, scale));
        }
    }
    static void write_levels(Row row, Table table, float scale, float* to) {
        for (int half = 0; half < 2; ++half) {
            const __m128i bytes = half == 0 ? _mm256_castsi256_si128(row) : _mm256_extracti128_si256(row, 1);
            const Floats levels = {level(table, _mm256_cvtepu8_epi32(bytes)),
                                   level(table, _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
            store(to + 16 * half, scaled(levels, scale));
        }
    }

  private:
    static __m256i add_wide(__m256i sums, __m256i codes, __m256i even, __m256i odd) {
        const __m256i low = _mm256_and_si256(codes, _mm256_set1_epi16(255)), high = _mm256_srli_epi16(codes, 8);
        return _mm256_add_epi32(sums, _mm256_add_epi32(_mm256_madd_epi16(low, even), _mm256_madd_epi16(high, odd)));
    }
    // vpermps reads the low three bits of an index, vblendvps the highest: bit 3 is moved there
    static __m256 level(Table table, __m256i index) {
        const __m256 low = _mm256_permutevar8x32_ps(table.a, index), high = _mm256_permutevar8x32_ps(table.b, index);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
    }
};

} // namespace
} // namespace bitpalette
