// The step for AVX2: 16 states in a register, otherwise as in trellis_step_avx512.cpp.
#include <cstring>

#include "trellis_step.h"

#if BITPALETTE_X86
#include <immintrin.h>

namespace bitpalette {
namespace {

constexpr int lanes = 16;
constexpr int prefetch = 16 * lanes; // levels

// lanes >> E costs, 2^E times over; one cost from 4 bits on.
template <int E>
__m256i repeat(const uint16_t* from) {
    if constexpr (E == 1)
        return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    if constexpr (E == 2) {
        int64_t four;
        std::memcpy(&four, from, sizeof four);
        return _mm256_set1_epi64x(four);
    }
    if constexpr (E == 3) {
        int32_t two;
        std::memcpy(&two, from, sizeof two);
        return _mm256_set1_epi32(two);
    }
    return _mm256_set1_epi16(static_cast<int16_t>(*from));
}

// Lanes n * 16 / 2^E + t to t * 2^E + n. There is no permutation of 16 lanes: pairs move within a half, then between.
template <int E>
__m256i in_order(__m256i v) {
    const __m256i pairs = _mm256_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15, //
                                           0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
    const __m256i evens = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15, //
                                           0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    if constexpr (E == 1) // quarters a b | c d hold n = 0 | 1: a c | b d, then alternating
        return _mm256_shuffle_epi8(_mm256_permute4x64_epi64(v, 0b11'01'10'00), pairs);
    if constexpr (E == 2) // n = 0, 1 | 2, 3 alternating, then their pairs
        return _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(v, pairs), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    if constexpr (E == 3) // n = 0..3 | 4..7: those of the first t, then those of the second
        return _mm256_permute4x64_epi64(_mm256_shuffle_epi8(v, evens), 0b11'01'10'00);
    return v;
}

// Saturating subtraction runs on fewer ports than the plain one.
template <bool saturates>
__m256i difference(__m256i a, __m256i b) {
    return saturates ? _mm256_subs_epi16(a, b) : _mm256_sub_epi16(a, b);
}

template <int E, int F, int Tiles, bool saturates>
void step(const TrellisStep& s) {
    const __m256i most = _mm256_set1_epi16(trellis_row_most);
    const int n = 1 << (s.window - F), stride = n >> E;
    const int16_t* level = s.levels;
    __m256i x[Tiles], least[Tiles];
    const uint16_t *from[Tiles], *later[Tiles];
    uint16_t* to[Tiles];
    for (int tile = 0; tile < Tiles; ++tile) {
        x[tile] = _mm256_set1_epi16(s.x[tile]);
        from[tile] = s.from[tile], to[tile] = s.to[tile], later[tile] = s.later[tile];
    }
    for (int t = 0; t < n; t += lanes) {
        for (int tile = 0; tile < Tiles; ++tile) {
            least[tile] = most;
            if (t % (2 * lanes) == 0)
                _mm_prefetch(reinterpret_cast<const char*>(later[tile] + t), _MM_HINT_T1);
        }
#pragma GCC unroll 32
        for (int h = 0; h < 1 << F; ++h, level += lanes) {
            if (h % 2 == 0) // a line holds two vectors
                _mm_prefetch(reinterpret_cast<const char*>(level + prefetch), _MM_HINT_T0);
            const __m256i levels = _mm256_load_si256(reinterpret_cast<const __m256i*>(level));
            for (int tile = 0; tile < Tiles; ++tile) {
                const __m256i d = difference<saturates>(x[tile], levels);
                const __m256i before = repeat<E>(from[tile] + (t >> E) + h * stride);
                least[tile] = _mm256_min_epu16(least[tile], _mm256_add_epi16(_mm256_mulhrs_epi16(d, d), before));
            }
        }
        for (int tile = 0; tile < Tiles; ++tile)
            _mm256_store_si256(reinterpret_cast<__m256i*>(to[tile] + t), in_order<E>(least[tile]));
    }
}

void cone(const TrellisCone& c) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const auto all = [](uint32_t value) { return _mm256_set1_epi32(static_cast<int>(value)); };
    // products of states that follow each other, a vector apart
    __m256i product = _mm256_mullo_epi32(_mm256_add_epi32(all(c.low), _mm256_mullo_epi32(all(c.stride), lane)),
                                         all(trellis_multiplier));
    const __m256i fixed = _mm256_set1_epi32(c.fixed);
    const __m256i next = all(8 * c.stride * trellis_multiplier), half = all(1 << 14), most = all(trellis_row_most);
    const __m256i x = _mm256_set1_epi32(c.x + trellis_level_centre * c.fixed);
    for (int i = 0; i < c.n; i += 8) {
        __m256i least = most;
        for (int h = 0; h < c.folded; ++h)
            least =
                _mm256_min_epu32(least, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(c.before + h * c.n + i)));
        const __m256i pairs = _mm256_maddubs_epi16(product, _mm256_set1_epi8(1));
        const __m256i bytes = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
        const __m256i d = _mm256_sub_epi32(x, _mm256_mullo_epi32(bytes, fixed));
        const __m256i metric = _mm256_srli_epi32(_mm256_add_epi32(_mm256_mullo_epi32(d, d), half), 15);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(c.costs + i), _mm256_add_epi32(least, metric));
        product = _mm256_add_epi32(product, next);
    }
}

uint16_t normalize(uint16_t* row, int n) {
    const auto at = [row](int t) { return reinterpret_cast<__m256i*>(row + t); };
    __m256i least = _mm256_set1_epi16(-1);
    for (int t = 0; t < n; t += lanes)
        least = _mm256_min_epu16(least, _mm256_load_si256(at(t)));
    const __m128i half = _mm_min_epu16(_mm256_castsi256_si128(least), _mm256_extracti128_si256(least, 1));
    const uint16_t value = static_cast<uint16_t>(_mm_extract_epi16(_mm_minpos_epu16(half), 0));
    const __m256i offset = _mm256_set1_epi16(static_cast<int16_t>(value));
    for (int t = 0; t < n; t += lanes)
        _mm256_store_si256(at(t), _mm256_sub_epi16(_mm256_load_si256(at(t)), offset));
    return value;
}

template <int E, int Tiles, bool saturates>
constexpr void add_steps(TrellisStepUnit& unit) {
    auto& steps = unit.step[saturates][Tiles - 1][E - 1];
    if constexpr (trellis_step_exists(saturates, E, E - 1))
        steps[0] = step<E, E - 1, Tiles, saturates>;
    if constexpr (trellis_step_exists(saturates, E, E))
        steps[1] = step<E, E, Tiles, saturates>;
    if constexpr (trellis_step_exists(saturates, E, E + 1))
        steps[2] = step<E, E + 1, Tiles, saturates>;
    if constexpr (E > 1)
        add_steps<E - 1, Tiles, saturates>(unit);
}

constexpr TrellisStepUnit make_unit() {
    TrellisStepUnit unit{lanes, {}, cone, normalize};
    add_steps<trellis_most_step, 1, false>(unit);
    add_steps<trellis_most_step, 1, true>(unit);
    add_steps<trellis_most_step, 2, false>(unit);
    add_steps<trellis_most_step, 2, true>(unit);
    return unit;
}

} // namespace

constexpr TrellisStepUnit trellis_step_avx2 = make_unit();

} // namespace bitpalette
#endif
