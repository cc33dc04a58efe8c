// The step for AVX-512: 32 states in a register.
//
// A vector of 32 consecutive t' = t << E | n holds 32 / 2^E costs A[t], each 2^E times. Were its lanes in order, every
// vector would need a shuffle, which one port only has. In the order n << (5 - E) | t a plain broadcasting load repeats
// the costs, at no arithmetic: only the finished row is put in order, one permutation for 2^F vectors.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized" // gcc 12's own avx512fintrin.h
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <cstring>

#include "trellis_step.h"

#if BITPALETTE_X86
#include <immintrin.h>

namespace bitpalette {
namespace {

constexpr int lanes = 32;
constexpr int prefetch = 16 * lanes; // levels: at L = 16 they come from the second-level cache; 10 % at 2 bits

// lanes >> E costs, 2^E times over.
template <int E>
__m512i repeat(const uint16_t* from) {
    if constexpr (E == 1)
        return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    if constexpr (E == 2)
        return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    if constexpr (E == 3) {
        int64_t four;
        std::memcpy(&four, from, sizeof four);
        return _mm512_set1_epi64(four);
    }
    if constexpr (E == 4) {
        int32_t two;
        std::memcpy(&two, from, sizeof two);
        return _mm512_set1_epi32(two);
    }
    return _mm512_set1_epi16(static_cast<int16_t>(*from));
}

// Lane of t' (0..31) for expansion by E bits.
template <int E>
__m512i order() {
    alignas(64) int16_t lane[lanes];
    for (int t = 0; t < lanes; ++t)
        lane[t] = static_cast<int16_t>((t & ((1 << E) - 1)) << (5 - E) | t >> E);
    return _mm512_load_si512(lane);
}

// Saturating subtraction runs on fewer ports than the plain one.
template <bool saturates>
__m512i difference(__m512i a, __m512i b) {
    return saturates ? _mm512_subs_epi16(a, b) : _mm512_sub_epi16(a, b);
}

template <int E, int F>
void step(const TrellisStep& s) {
    const __m512i x = _mm512_set1_epi16(s.x), most = _mm512_set1_epi16(trellis_row_most), natural = order<E>();
    const int n = 1 << (s.window - F), stride = n >> E;
    const int16_t* level = s.levels;
    const uint16_t* from = s.from;
    uint16_t* to = s.to;
    for (int t = 0; t < n; t += lanes, from += lanes >> E) {
        __m512i least = most;
#pragma GCC unroll 32
        for (int h = 0; h < 1 << F; ++h, level += lanes) {
            _mm_prefetch(reinterpret_cast<const char*>(level + prefetch), _MM_HINT_T0);
            const __m512i d = difference<trellis_saturates(E, F)>(x, _mm512_load_si512(level));
            const __m512i cost = _mm512_add_epi16(_mm512_mulhrs_epi16(d, d), repeat<E>(from + h * stride));
            least = _mm512_min_epu16(least, cost);
        }
        _mm512_store_si512(to + t, E == 5 ? least : _mm512_permutexvar_epi16(natural, least));
    }
}

uint16_t normalize(uint16_t* row, int n) {
    __m512i least = _mm512_set1_epi16(-1);
    for (int t = 0; t < n; t += lanes)
        least = _mm512_min_epu16(least, _mm512_load_si512(row + t));
    const __m256i half = _mm256_min_epu16(_mm512_castsi512_si256(least), _mm512_extracti64x4_epi64(least, 1));
    const __m128i quarter = _mm_min_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    const uint16_t value = static_cast<uint16_t>(_mm_extract_epi16(_mm_minpos_epu16(quarter), 0));
    const __m512i offset = _mm512_set1_epi16(static_cast<int16_t>(value));
    for (int t = 0; t < n; t += lanes)
        _mm512_store_si512(row + t, _mm512_sub_epi16(_mm512_load_si512(row + t), offset));
    return value;
}

} // namespace

const TrellisStepUnit trellis_step_avx512{lanes,
                                          {{nullptr, step<1, 1>, step<1, 2>},
                                           {step<2, 1>, step<2, 2>, step<2, 3>},
                                           {step<3, 2>, step<3, 3>, step<3, 4>},
                                           {step<4, 3>, step<4, 4>, step<4, 5>},
                                           {step<5, 4>, step<5, 5>, nullptr}},
                                          normalize};

} // namespace bitpalette
#endif
