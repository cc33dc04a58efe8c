#include "trellis_plan.h"

#include <algorithm>
#include <cmath>

#include "trellis_levels.h"

namespace bitpalette {
namespace {

// Whole eighths, so that both passes begin with a normalized row that is kept. A path forgets where it began within 2
// to 3 windows (L / rate weights); this many lose .01 to .015 dB against 160 at L = 12, a third as many would lose .04.
int lead_steps(const TrellisCode& code) {
    const double steps = code.window * (0.5 + 72.0 / code.m);
    return std::max(16,
                    static_cast<int>(std::lround(steps / TrellisPlan::normalize_every)) * TrellisPlan::normalize_every);
}

// Two share what is read of levels, 12 % of the search at L = 16 and 2 bits, and one goes on where the other waits.
// Below 1.5 bits the rows of two, up to 16 KiB each, leave no room in the first-level cache: one alone takes 7 to 11 %
// less.
int tiles_together(const TrellisCode& code) {
    return code.window < 16 && code.m < 24 ? 1 : trellis_most_tiles;
}

} // namespace

TrellisPlan::TrellisPlan(const TrellisStepUnit& unit, const TrellisCode& code)
    : unit(unit), code(code), fixed(trellis_fixed(code.m)), levels(trellis_levels(fixed, code.window, 1, 0, 0)),
      lead(lead_steps(code)), seam(lead - 1), last(lead + trellis_weights - 1),
      row_size(1 << (code.window - code.step(0))), together(tiles_together(code)) {
    for (int step = 0; step <= last; ++step) {
        const int weight = trellis_weight_of_step(lead, step);
        const int expand = code.step(weight), fold = code.step(trellis_weight_of_step(lead, step + 1));
        const int16_t* order = trellis_levels(fixed, code.window, unit.lanes, expand, fold);
        Step s{weight, expand, fold, 1 << (code.window - fold), order, {}};
        for (int k = 0; k < trellis_most_tiles; ++k)
            s.run[k] = unit.step[fixed == 64][k][expand - 1][fold - expand + 1];
        steps.push_back(s);
    }
}

} // namespace bitpalette
