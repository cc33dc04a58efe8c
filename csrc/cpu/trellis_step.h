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
// Arithmetic, the same everywhere (16-bit integers):
//     d      = x - level, saturating (sixty-fourths can); both are in sixteenths, thirty-seconds or sixty-fourths
//     (trellis_levels.h) metric = (d * d + 2^14) >> 15, at most 32768 cost   = A[t] + metric: rows are at most 32767,
//     so nothing wraps row    = min(costs, 32767)
#pragma once

#include <cstdint>

#include "isa.h"

namespace bitpalette {

constexpr uint16_t trellis_row_most = 32767;
constexpr int trellis_most_step = 5; // bits

// Sixty-fourths come with steps of 3 bits and more only: rates from 52 sixteenths on.
constexpr bool trellis_saturates(int expand, int fold) {
    return expand >= 3 && fold >= 3;
}

struct TrellisStep {
    const int16_t* levels; // of all states, in the unit's order for (expand, fold)
    const uint16_t* from;  // A_i      [2^(window - expand)]
    uint16_t* to;          // A_{i-1}  [2^(window - fold)]
    int window, expand, fold;
    int16_t x;
};

struct TrellisStepUnit {
    // States in one vector, which decides in what order levels are stored (trellis_levels.h).
    int lanes;
    // by expand - 1 and fold - expand + 1: neighbouring weights' steps differ by a bit at most
    void (*step[trellis_most_step][3])(const TrellisStep& s);
    // Subtracts the least value of a row from all; returns it.
    uint16_t (*normalize)(uint16_t* row, int n);
};

extern const TrellisStepUnit trellis_step_scalar;
#if BITPALETTE_X86
extern const TrellisStepUnit trellis_step_avx2;
extern const TrellisStepUnit trellis_step_avx512;
#endif

} // namespace bitpalette
