// The search for one tile's states: passes, tail-biting, traceback. Rows of costs come from a TrellisStepUnit.
#pragma once

#include <cstdint>
#include <vector>

#include "trellis_code.h"
#include "trellis_step.h"

namespace bitpalette {

class TrellisSearch {
  public:
    TrellisSearch(const TrellisStepUnit& unit, const TrellisCode& code);

    // states [256] of the tile x [256] (in levels), which join cyclically. False where the 16-bit search could not find
    // them and the 64-bit one did.
    bool find(const float* x, uint16_t* states);

    bool is_for(const TrellisStepUnit& unit, const TrellisCode& code) const {
        return &unit == &unit_ && code.m == code_.m && code.window == code_.window;
    }

  private:
    struct Step { // the same for every tile
        int weight;
        int expand, fold;
        const int16_t* levels;
    };

    uint16_t state_before(int step, uint32_t kept) const;
    bool search();
    void search_exactly();
    void exact_step(int step);
    uint32_t exact_state_before(int step, uint32_t kept) const;
    uint16_t* row(int step);
    const uint16_t* row(int step) const { return const_cast<TrellisSearch*>(this)->row(step); }

    const TrellisStepUnit& unit_;
    TrellisCode code_;
    const int16_t* levels_; // 64 * level of every state, in order
    int lead_;              // steps before the seam
    std::vector<Step> steps_;
    std::vector<uint16_t> rows_, lead_rows_;
    int row_size_;
    int16_t x_[trellis_weights];
    std::vector<uint16_t> path_;      // state of every step
    std::vector<uint8_t> decisions_;  // of the exact search
    std::vector<uint64_t> costs_[2];  // of the exact search
};

} // namespace bitpalette
