// The rows of costs that a pass leaves behind, from which the best path is traced back by comparing again.
//
// One row in every_ is kept: 256 rows at L = 16 and 2 bits are 8 MiB, which leave the second-level cache and then cost
// more than the search itself. The rows between two kept ones are computed again where the path can have come from, a
// cone that widens by the fold of each step:
//
//     step of the row       r                r + 1            r + 2 (kept: the traceback arrives here with one t)
//     elements wanted       2^(f0 + f1)      2^f1             1
//                           equally spaced: all combinations of the top bits, low bits as in the one that was reached
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "trellis_plan.h"

namespace bitpalette {

class TrellisRows {
  public:
    explicit TrellisRows(const TrellisPlan& plan);

    // Where the row is that enters a step. Those of step 0, of the one after the seam and of the one after the last can
    // be read after a pass.
    uint16_t* operator[](int step) { return rows_[static_cast<size_t>(step)]; }
    const uint16_t* operator[](int step) const { return rows_[static_cast<size_t>(step)]; }

    // Whether the row that enters a step stays until the traceback.
    bool kept(int step) const { return step >= first_ && (step - first_) % every_ == 0; }

    // The state of a step (the seam's or one after it) from the low bits that the next step keeps of it: the cheapest,
    // of equals the first. x [256].
    uint32_t state_before(int step, uint32_t low, const int16_t* x);

  private:
    struct Level { // of the cone: costs of the states of one step
        uint32_t stride, low;
        std::vector<uint32_t> costs; // of state i * stride + low
    };
    struct Free {
        void operator()(uint16_t* memory) const;
    };

    void compute_cone(int last, uint32_t low, const int16_t* x);

    const TrellisPlan& plan_;
    int every_; // steps
    int first_; // step whose row is kept
    std::unique_ptr<uint16_t, Free> memory_;
    std::vector<uint16_t*> rows_;  // by step
    std::vector<uint32_t> wanted_; // of a kept row: the costs where the cone begins
    std::vector<Level> cone_;      // by (step - first_) % every_
    int next_ = 0;                 // step for which the cone holds the states that lead to where the path has come
};

} // namespace bitpalette
