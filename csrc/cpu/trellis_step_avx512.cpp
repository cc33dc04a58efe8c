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

// Lane of t' (0..31) for expansion by E bits; of its two bytes for vpermb.
template <int E, bool vbmi>
__m512i order() {
    alignas(64) uint8_t byte[2 * lanes];
    alignas(64) int16_t word[lanes];
    for (int t = 0; t < lanes; ++t) {
        const int lane = (t & ((1 << E) - 1)) << (5 - E) | t >> E;
        word[t] = static_cast<int16_t>(lane);
        byte[2 * t] = static_cast<uint8_t>(2 * lane);
        byte[2 * t + 1] = static_cast<uint8_t>(2 * lane + 1);
    }
    return vbmi ? _mm512_load_si512(byte) : _mm512_load_si512(word);
}

// vpermw is two operations, one of them on the only port that has vpminuw; vpermb is one, on the other port: 12 % of a
// step at 1 bit, 5 at 2. In assembler, so that this file needs no flag that a machine without VBMI could trip over.
template <bool vbmi>
__m512i permute(__m512i v, __m512i order) {
    if constexpr (!vbmi)
        return _mm512_permutexvar_epi16(order, v);
    __m512i permuted;
    asm("vpermb %1, %2, %0" : "=v"(permuted) : "v"(v), "v"(order));
    return permuted;
}

// Saturating subtraction runs on fewer ports than the plain one.
template <bool saturates>
__m512i difference(__m512i a, __m512i b) {
    return saturates ? _mm512_subs_epi16(a, b) : _mm512_sub_epi16(a, b);
}

template <int E, int F, int Tiles, bool saturates, bool vbmi>
void step(const TrellisStep& s) {
    const __m512i most = _mm512_set1_epi16(trellis_row_most), natural = order<E, vbmi>();
    const int n = 1 << (s.window - F), stride = n >> E;
    const int16_t* level = s.levels;
    __m512i x[Tiles], least[Tiles];
    const uint16_t *from[Tiles], *later[Tiles];
    uint16_t* to[Tiles];
    for (int tile = 0; tile < Tiles; ++tile) {
        x[tile] = _mm512_set1_epi16(s.x[tile]);
        from[tile] = s.from[tile], to[tile] = s.to[tile], later[tile] = s.later[tile];
    }
    for (int t = 0; t < n; t += lanes) {
        for (int tile = 0; tile < Tiles; ++tile) {
            least[tile] = most;
            _mm_prefetch(reinterpret_cast<const char*>(later[tile] + t), _MM_HINT_T1);
        }
#pragma GCC unroll 32
        for (int h = 0; h < 1 << F; ++h, level += lanes) {
            _mm_prefetch(reinterpret_cast<const char*>(level + prefetch), _MM_HINT_T0);
            const __m512i levels = _mm512_load_si512(level);
            for (int tile = 0; tile < Tiles; ++tile) {
                const __m512i d = difference<saturates>(x[tile], levels);
                const __m512i before = repeat<E>(from[tile] + (t >> E) + h * stride);
                least[tile] = _mm512_min_epu16(least[tile], _mm512_add_epi16(_mm512_mulhrs_epi16(d, d), before));
            }
        }
        for (int tile = 0; tile < Tiles; ++tile)
            _mm512_store_si512(to[tile] + t, E == 5 ? least[tile] : permute<vbmi>(least[tile], natural));
    }
}

void cone(const TrellisCone& c) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const auto all = [](uint32_t value) { return _mm512_set1_epi32(static_cast<int>(value)); };
    // products of states that follow each other, a vector apart
    __m512i product = _mm512_mullo_epi32(_mm512_add_epi32(all(c.low), _mm512_mullo_epi32(all(c.stride), lane)),
                                         all(trellis_multiplier));
    const __m512i fixed = _mm512_set1_epi32(c.fixed);
    const __m512i next = all(16 * c.stride * trellis_multiplier), half = all(1 << 14), most = all(trellis_row_most);
    const __m512i x = _mm512_set1_epi32(c.x + trellis_level_centre * c.fixed), ones = _mm512_set1_epi8(1);
    for (int i = 0; i < c.n; i += 16) {
        __m512i least = most;
        for (int h = 0; h < c.folded; ++h)
            least = _mm512_min_epu32(least, _mm512_loadu_si512(c.before + h * c.n + i));
        const __m512i bytes = _mm512_dpbusd_epi32(_mm512_setzero_si512(), product, ones);
        const __m512i d = _mm512_sub_epi32(x, _mm512_mullo_epi32(bytes, fixed));
        const __m512i metric = _mm512_srli_epi32(_mm512_add_epi32(_mm512_mullo_epi32(d, d), half), 15);
        _mm512_storeu_si512(c.costs + i, _mm512_add_epi32(least, metric));
        product = _mm512_add_epi32(product, next);
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

template <int E, int Tiles, bool saturates, bool vbmi>
constexpr void add_steps(TrellisStepUnit& unit) {
    auto& steps = unit.step[saturates][Tiles - 1][E - 1];
    if constexpr (trellis_step_exists(saturates, E, E - 1))
        steps[0] = step<E, E - 1, Tiles, saturates, vbmi>;
    if constexpr (trellis_step_exists(saturates, E, E))
        steps[1] = step<E, E, Tiles, saturates, vbmi>;
    if constexpr (trellis_step_exists(saturates, E, E + 1))
        steps[2] = step<E, E + 1, Tiles, saturates, vbmi>;
    if constexpr (E > 1)
        add_steps<E - 1, Tiles, saturates, vbmi>(unit);
}

template <bool vbmi>
constexpr TrellisStepUnit make_unit() {
    TrellisStepUnit unit{lanes, {}, cone, normalize};
    add_steps<trellis_most_step, 1, false, vbmi>(unit);
    add_steps<trellis_most_step, 1, true, vbmi>(unit);
    add_steps<trellis_most_step, 2, false, vbmi>(unit);
    add_steps<trellis_most_step, 2, true, vbmi>(unit);
    return unit;
}

} // namespace

constexpr TrellisStepUnit trellis_step_avx512 = make_unit<false>();
constexpr TrellisStepUnit trellis_step_avx512vbmi = make_unit<true>();

} // namespace bitpalette
#endif
