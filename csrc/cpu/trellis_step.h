// One step of the search, which each instruction set's translation unit provides; the rest is in trellis_search.cpp.
//
// Time runs from weight 255 down to 0. A row of costs A_i[t], t < 2^(L - k_i), has the least cost of the weights before
// weight i (in time) for the low L - k_i bits of state i + 1, which are all that state i keeps of it:
//
//     state i = t << k_i | new bits                     cost = A_i[t] + metric(x_i, level(state i))       (expand)
//     A_{i-1}[t'] = least cost of the 2^k_{i-1} states i that have the low bits t'                        (fold)
//
// The states that a fold compares are h << (L - k_{i-1}) | t' for h = 0, 1, ...: an element-wise minimum of contiguous
// blocks. Costs of states are never stored, only rows.
//
// Arithmetic, the same everywhere (16-bit integers), in sixteenths, thirty-seconds or sixty-fourths (trellis_levels.h):
//
//     d      = x - level, saturating (sixty-fourths can)
//     metric = (d * d + 2^14) >> 15, at most 32768
//     cost   = A[t] + metric: rows are at most 32767, so nothing wraps
//     row    = min(costs, 32767)
#pragma once

#include <cstdint>

#include "isa.h"
#include "trellis_code.h"

namespace bitpalette {

constexpr uint16_t trellis_row_most = 32767;
constexpr int trellis_most_step = 5; // bits

// Tiles that one step advances: each vector of levels, which at L = 16 come from the second-level cache, serves all.
constexpr int trellis_most_tiles = 2;

// Only sixty-fourths saturate; they come with rates from 52 sixteenths on, whose steps are of 3 bits and more. Thirty-
// seconds come with rates below that, whose steps are of 4 bits at most.
constexpr bool trellis_step_exists(bool saturates, int expand, int fold) {
    const int change = fold - expand;
    return change >= -1 && change <= 1 && (saturates ? expand >= 3 && fold >= 3 : expand <= 4 && fold <= 4) &&
           expand >= 1 && fold >= 1 && expand <= trellis_most_step && fold <= trellis_most_step;
}

struct TrellisStep {
    const int16_t* levels;                     // of all states, in the unit's order for (expand, fold)
    const uint16_t* from[trellis_most_tiles];  // A_i      [2^(window - expand)], by tile
    uint16_t* to[trellis_most_tiles];          // A_{i-1}  [2^(window - fold)]
    const uint16_t* later[trellis_most_tiles]; // a row that will be written soon and may have left the cache
    int16_t x[trellis_most_tiles];
    int window, expand, fold;
};

// What trellis_level is made of (trellis_code.h), for vectors.
constexpr uint32_t trellis_multiplier = 0x83DCD12Du;
constexpr int trellis_level_centre = 510;
static_assert(trellis_level(1) == 0x83 + 0xDC + 0xD1 + 0x2D - trellis_level_centre);

// Costs of some states of one step, for the traceback: state low + i * stride for i < n. Its last vector is computed in
// whole, so `costs` has room for 15 more and `before` can be read as far.
struct TrellisCone {
    const uint32_t* before; // [folded, n]: costs of the step before, of which the least counts
    uint32_t* costs;        // [n]
    int folded, n;
    uint32_t low, stride;
    int x, fixed; // of a level
};

struct TrellisStepUnit {
    // States in one vector, which decides in what order levels are stored (trellis_levels.h).
    int lanes;
    // by saturation, tiles - 1, expand - 1 and fold - expand + 1: neighbouring weights' steps differ by a bit at most
    void (*step[2][trellis_most_tiles][trellis_most_step][3])(const TrellisStep& s);
    void (*cone)(const TrellisCone& c);
    // Subtracts the least value of a row from all; returns it.
    uint16_t (*normalize)(uint16_t* row, int n);
};

extern const TrellisStepUnit trellis_step_scalar;
#if BITPALETTE_X86
extern const TrellisStepUnit trellis_step_avx2;
extern const TrellisStepUnit trellis_step_avx512;
extern const TrellisStepUnit trellis_step_avx512vbmi; // in the same file
#endif
#if BITPALETTE_AARCH64
extern const TrellisStepUnit trellis_step_neon;
#endif

} // namespace bitpalette
