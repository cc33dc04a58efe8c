// The search for one tile's states: passes, tail-biting, traceback. Rows of costs come from a TrellisStepUnit.
//
// A pass starts `lead` weights before the seam (the end of the string, where weight 0 meets weight 255) with all states
// equal, crosses it and goes once round the tile:
//
//     weight   lead-1 ... 1 0 | 255 254 ............................ 1 0 |
//     step     0 ...  lead-1  | lead ....................... lead+255    |
//                            seam                                       end
//
// The best path fixes the seam's state: it is the one there that suits the lead before it and the 256 weights after it.
// Traced back once more from that state at the end, a path falls in with the best one within some windows, so it crosses
// the seam in the state that it ends in: it is cyclic, and the best of all that cross in this state. Where it does not
// (3 % of the tiles at 1 bit, fewer above), a second pass starts in the seam's state.
#pragma once

#include <cstdint>
#include <vector>

#include "trellis_code.h"
#include "trellis_step.h"

namespace bitpalette {

class TrellisSearch {
  public:
    TrellisSearch(const TrellisStepUnit& unit, const TrellisCode& code);

    bool is_for(const TrellisStepUnit& unit, const TrellisCode& code) const {
        return &unit == &unit_ && code.m == code_.m && code.window == code_.window;
    }

    // states [256] of the tile x [256] (in levels), which join cyclically. False where the 16-bit search could not find
    // them and the exact one did.
    bool find(const float* x, uint16_t* states);

  private:
    struct Step { // the same for every tile
        int weight;
        int expand, fold;
        int kept; // states that a fold leaves, 2^(L - fold)
        const int16_t* levels;
    };

    bool search();
    void pass(int first);
    uint32_t trace(uint32_t state, int stop, bool join);
    uint32_t state_before(int step, uint32_t kept);
    int32_t cost(int row_step, uint32_t t) const;

    uint16_t* row(int step);
    const uint16_t* row(int step) const { return const_cast<TrellisSearch*>(this)->row(step); }

    const TrellisStepUnit& unit_;
    TrellisCode code_;
    int fixed_;             // of a level
    const int16_t* levels_; // of every state, in order
    int keep_every_;        // rows
    int lead_, seam_, last_; // steps
    int row_size_;
    std::vector<Step> steps_;
    std::vector<uint16_t> kept_rows_, passing_rows_;
    std::vector<uint16_t> path_; // a state for every step
    int16_t x_[trellis_weights];
    bool clipped_ = false; // a traced path's cost exceeds what rows hold
};

} // namespace bitpalette
