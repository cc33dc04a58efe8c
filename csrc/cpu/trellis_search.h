// The search for one tile's states: two passes at most (trellis_plan.h), tail-biting, traceback.
//
// The best path of the free pass fixes the seam's state: the one that suits the lead before it and the 256 weights
// after it. Traced back once more from that state at the end, a path falls in with the best one within some windows, so
// it crosses the seam in the state that it ends in: it is cyclic, and the best of all that cross in this state. Where
// it does not, a second pass starts in the seam's state: 4 % of the tiles at L = 12 and 1 bit, few above; at L = 16,
// where 256 weights are fewer windows, 20 % at 1 bit, 12 % at 2, 4 % at 4.
//
// Costs along the traced path are added up once more: if all are below what rows hold nothing was clipped on it, and no
// clipped path, whose cost is understated, was better: it is the optimum. Else the exact search takes over.
#pragma once

#include <cstdint>
#include <vector>

#include "trellis_plan.h"
#include "trellis_rows.h"

namespace bitpalette {

class TrellisSearch {
  public:
    TrellisSearch(const TrellisStepUnit& unit, const TrellisCode& code);

    bool is_for(const TrellisStepUnit& unit, const TrellisCode& code) const {
        return &unit == &unit_ && code.m == plan_.code.m && code.window == plan_.code.window;
    }

    // states [256] of the tile x [256] (in levels), which join cyclically. False where the 16-bit search could not find
    // them and the exact one did.
    bool find(const float* x, uint16_t* states);

  private:
    bool search();
    void pass(int first);
    uint32_t trace(uint32_t state, int stop, bool join);
    bool clipped(int last);

    const TrellisStepUnit& unit_;
    TrellisPlan plan_;
    TrellisRows rows_;
    std::vector<uint16_t> path_;       // a state for every step
    std::vector<uint16_t> subtracted_; // from the row that enters a step
    int16_t x_[trellis_weights];
};

} // namespace bitpalette
