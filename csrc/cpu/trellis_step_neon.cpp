// The step for NEON: 8 states in a register, otherwise as in trellis_step_avx512.cpp.
#include <cstring>

#include "trellis_step.h"

#if BITPALETTE_AARCH64
#include <arm_neon.h>

namespace bitpalette {
namespace {

constexpr int lanes = 8;
constexpr int line = 32;                // costs or levels in 64 bytes
constexpr int prefetch = 8 * line;      // levels
constexpr int next_cache = 2, soon = 3; // of __builtin_prefetch

// lanes >> E costs, 2^E times over; one cost from 3 bits on.
template <int E>
uint16x8_t repeat(const uint16_t* from) {
    if constexpr (E == 1) {
        const uint16x4_t four = vld1_u16(from);
        return vcombine_u16(four, four);
    } else if constexpr (E == 2) {
        uint32_t two;
        std::memcpy(&two, from, sizeof two);
        return vreinterpretq_u16_u32(vdupq_n_u32(two));
    } else {
        return vdupq_n_u16(*from);
    }
}

// Lanes n * 8 / 2^E + t to t * 2^E + n.
template <int E>
uint16x8_t in_order(uint16x8_t v) {
    if constexpr (E == 1) // halves n = 0 | 1: alternating
        return vzip1q_u16(v, vextq_u16(v, v, 4));
    if constexpr (E == 2) // alternating t: those of the first, then those of the second
        return vuzp1q_u16(v, vextq_u16(v, v, 1));
    return v;
}

// As everywhere a difference that leaves 16 bits becomes the largest that fits.
template <bool saturates>
int16x8_t difference(int16x8_t a, int16x8_t b) {
    return saturates ? vqsubq_s16(a, b) : vsubq_s16(a, b);
}

template <int E, int F, int Tiles, bool saturates>
void step(const TrellisStep& s) {
    const uint16x8_t most = vdupq_n_u16(trellis_row_most);
    const int n = 1 << (s.window - F), stride = n >> E;
    const int16_t* level = s.levels;
    int16x8_t x[Tiles];
    uint16x8_t least[Tiles];
    const uint16_t *from[Tiles], *later[Tiles];
    uint16_t* to[Tiles];
    for (int tile = 0; tile < Tiles; ++tile) {
        x[tile] = vdupq_n_s16(s.x[tile]);
        from[tile] = s.from[tile], to[tile] = s.to[tile], later[tile] = s.later[tile];
    }
    for (int t = 0; t < n; t += lanes) {
        for (int tile = 0; tile < Tiles; ++tile) {
            least[tile] = most;
            if (t % line == 0)
                __builtin_prefetch(later[tile] + t, 0, next_cache);
        }
#pragma GCC unroll 32
        for (int h = 0; h < 1 << F; ++h, level += lanes) {
            if (h % (line / lanes) == 0)
                __builtin_prefetch(level + prefetch, 0, soon);
            const int16x8_t levels = vld1q_s16(level);
            for (int tile = 0; tile < Tiles; ++tile) {
                const int16x8_t d = difference<saturates>(x[tile], levels);
                const uint16x8_t before = repeat<E>(from[tile] + (t >> E) + h * stride);
                // (d * d + 2^14) >> 15, but 32767 where that is 32768, which a row clips to 32767 all the same
                const uint16x8_t metric = vreinterpretq_u16_s16(vqrdmulhq_s16(d, d));
                least[tile] = vminq_u16(least[tile], vaddq_u16(metric, before));
            }
        }
        for (int tile = 0; tile < Tiles; ++tile)
            vst1q_u16(to[tile] + t, in_order<E>(least[tile]));
    }
}

void cone(const TrellisCone& c) {
    const uint32x4_t lane = {0, 1, 2, 3};
    // products of states that follow each other, a vector apart
    uint32x4_t product = vmulq_n_u32(vmlaq_n_u32(vdupq_n_u32(c.low), lane, c.stride), trellis_multiplier);
    const uint32x4_t next = vdupq_n_u32(4 * c.stride * trellis_multiplier), half = vdupq_n_u32(1 << 14);
    const uint32x4_t x = vdupq_n_u32(static_cast<uint32_t>(c.x + trellis_level_centre * c.fixed));
    const uint8x16_t ones = vdupq_n_u8(1);
    for (int i = 0; i < c.n; i += 4) {
        uint32x4_t least = vdupq_n_u32(trellis_row_most);
        for (int h = 0; h < c.folded; ++h)
            least = vminq_u32(least, vld1q_u32(c.before + h * c.n + i));
        const uint32x4_t bytes = vdotq_u32(vdupq_n_u32(0), vreinterpretq_u8_u32(product), ones);
        const uint32x4_t d = vmlsq_n_u32(x, bytes, static_cast<uint32_t>(c.fixed));
        const uint32x4_t metric = vshrq_n_u32(vmlaq_u32(half, d, d), 15);
        vst1q_u32(c.costs + i, vaddq_u32(least, metric));
        product = vaddq_u32(product, next);
    }
}

uint16_t normalize(uint16_t* row, int n) {
    uint16x8_t least = vdupq_n_u16(0xFFFF);
    for (int t = 0; t < n; t += lanes)
        least = vminq_u16(least, vld1q_u16(row + t));
    const uint16_t value = vminvq_u16(least);
    const uint16x8_t offset = vdupq_n_u16(value);
    for (int t = 0; t < n; t += lanes)
        vst1q_u16(row + t, vsubq_u16(vld1q_u16(row + t), offset));
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

constexpr TrellisStepUnit trellis_step_neon = make_unit();

} // namespace bitpalette
#endif
