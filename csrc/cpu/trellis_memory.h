// What a pass leaves behind, from which the best path is traced back.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "trellis_plan.h"

namespace bitpalette {

class TrellisMemory {
  public:
    virtual ~TrellisMemory() = default;

    // Where the row is that enters a step. Row 0, two rows that follow each other and that of the step after the seam
    // can be read.
    virtual uint16_t* row(int step) = 0;
    // Where the step's decisions go, null where none are wanted.
    virtual uint32_t* better(int step) = 0;
    // The state of a step from the low bits that the next step keeps of it: the cheapest, of equals the first. x [256].
    virtual uint32_t state_before(int step, uint32_t kept, const int16_t* x) = 0;
};

// Rows of costs: the traceback compares again. Where 256 rows leave the second-level cache writing them takes longer
// than computing what lies between two of them again, for the one path that is traced.
std::unique_ptr<TrellisMemory> trellis_keep_rows(const TrellisPlan& plan);

// Decisions, for units that make them (`decide`): 2^fold - 1 bits for a cost, of vectors of 32. Word h - 1 of a vector
// says where the cost of h was below those of 0 .. h - 1.
std::unique_ptr<TrellisMemory> trellis_keep_decisions(const TrellisPlan& plan);

} // namespace bitpalette
