// The search for the states of tiles: two passes at most (trellis_plan.h), tail-biting, traceback.
//
// The best path of the free pass fixes the seam's state: the one that suits the lead before it and the 256 weights
// after it. Traced back once more from that state at the end, a path falls in with the best one within some windows, so
// it crosses the seam in the state that it ends in: it is cyclic, and the best of all that cross in this state. Where
// it does not, a second pass starts in the seam's state: 4 % of the tiles at L = 12 and 1 bit, few above; at L = 16,
// where 256 weights are fewer windows, 20 % at 1 bit, 12 % at 2, 4 % at 4. (The second pass cannot end early: after 256
// weights most of its row still differs from the first pass's, if by little.)
//
// Two tiles are searched at once, and those that need a second pass are put in pairs as well.
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
        return &unit == &plan_.unit && code.m == plan_.code.m && code.window == plan_.code.window;
    }

    // states [count, 256] of the tiles x [count, 256] (in levels), which join cyclically. Returns how many of them the
    // 16-bit search could not find and the exact one did.
    int find(const float* x, int count, uint16_t* states);

  private:
    struct Tile {
        explicit Tile(const TrellisPlan& plan);

        TrellisRows rows;
        std::vector<uint16_t> path;       // a state for every step
        std::vector<uint16_t> subtracted; // from the row that enters a step
        int16_t x[trellis_weights];
    };
    struct Open { // a tile that needs a second pass
        int number;
        uint32_t seam; // its state there
    };
    enum class Outcome { found, clipped, not_cyclic };

    void take(Tile& tile, const float* x) const;
    bool fetches_row(int step) const;
    void pass(int first, int count);
    void first_pass(const float* x, int count, uint32_t* seams);
    Outcome close(Tile& tile, uint32_t seam) const;
    void second_pass(const float* x, const Open* open, int count);
    void trace(int count, uint32_t* states, int stop);
    uint32_t trace_back(Tile& tile, uint32_t state) const;
    bool clipped(const Tile& tile, int last) const;
    int give(Tile& tile, Outcome outcome, uint16_t* states) const;

    TrellisPlan plan_;
    std::vector<Tile> tiles_; // that are searched at once: some MiB each, made when they are first needed
};

} // namespace bitpalette
