// What a pass over a tile does in each of its steps, the same for all tiles of one code.
//
// A pass starts `lead` weights before the seam (the end of the string, where weight 0 meets weight 255) with all states
// equal, crosses it and goes once round the tile:
//
//     weight   lead-1 ... 1 0 | 255 254 ............................ 1 0 |
//     step     0 ...  lead-1  | lead ....................... lead+255    |
//                            seam                                       end
#pragma once

#include <cstdint>
#include <vector>

#include "trellis_code.h"
#include "trellis_step.h"

namespace bitpalette {

struct TrellisPlan {
    struct Step {
        int weight;
        int expand, fold;
        int kept;                                              // states that the fold leaves, 2^(L - fold)
        const int16_t* levels;                                 // in the unit's order
        void (*run[trellis_most_tiles])(const TrellisStep& s); // by tiles - 1
    };

    TrellisPlan(const TrellisStepUnit& unit, const TrellisCode& code);

    // Every so many steps a row's least value is subtracted from it, which keeps rows below 32767.
    static constexpr int normalize_every = 8;

    const TrellisStepUnit& unit;
    TrellisCode code;
    int fixed;             // of a level
    const int16_t* levels; // of all states, in order
    int lead, seam, last;  // steps: how many before the seam, the one before it, the last of all
    int row_size;          // room for the longest row
    int together;          // tiles that are searched at once
    std::vector<Step> steps;
};

// The metric of trellis_step.h without the saturation of d, which only changes costs that do not fit a row.
inline uint32_t trellis_metric(int32_t x, int32_t level) {
    const uint32_t d = static_cast<uint32_t>(x - level);
    return (d * d + (1u << 14)) >> 15;
}

} // namespace bitpalette
