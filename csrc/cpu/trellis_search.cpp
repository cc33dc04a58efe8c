#include "trellis_search.h"

#include <algorithm>
#include <cmath>

#include "trellis_exact.h"

namespace bitpalette {
TrellisSearch::TrellisSearch(const TrellisStepUnit& unit, const TrellisCode& code)
    : unit_(unit), plan_(unit, code), rows_(plan_), path_(plan_.steps.size()), subtracted_(plan_.steps.size() + 1) {}

void TrellisSearch::pass(int first) {
    subtracted_[first] = 0;
    for (int step = first; step <= plan_.last; ++step) {
        const TrellisPlan::Step& s = plan_.steps[step];
        uint16_t* to = rows_[step + 1];
        unit_.step[s.expand - 1][s.fold - s.expand + 1](
            {s.levels, rows_[step], to, plan_.code.window, s.expand, s.fold, x_[s.weight]});
        const bool normalize = (step + 1) % TrellisPlan::normalize_every == 0;
        subtracted_[step + 1] = normalize ? unit_.normalize(to, s.kept) : uint16_t{0};
    }
}

// Follows the best path that ends in `state` back to the step after `stop`, where `join` until it falls in with the one
// that is already there. Returns the state at `stop`.
uint32_t TrellisSearch::trace(uint32_t state, int stop, bool join) {
    for (int step = plan_.last; step > stop; --step) {
        if (join && step < plan_.last && path_[step] == state)
            return path_[stop];
        path_[step] = static_cast<uint16_t>(state);
        state = rows_.state_before(step - 1, state >> plan_.steps[step].expand, x_);
    }
    return state;
}

// Whether a cost that the traceback compared, up to the one of step `last`, does not fit a row.
bool TrellisSearch::clipped(int last) {
    uint32_t cost = rows_[plan_.lead][path_[plan_.lead] >> plan_.steps[plan_.lead].expand];
    if (cost + subtracted_[plan_.lead] >= trellis_row_most)
        return true;
    for (int step = plan_.lead; step <= last; ++step) {
        cost += trellis_metric(x_[plan_.steps[step].weight], plan_.levels[path_[step]]);
        if (cost >= trellis_row_most)
            return true;
        cost -= subtracted_[step + 1];
    }
    return false;
}

bool TrellisSearch::search() {
    const int seam = plan_.seam, lead = plan_.lead, last = plan_.last;
    std::fill_n(rows_[0], plan_.row_size, uint16_t{0});
    pass(0);
    const uint16_t* end = rows_[last + 1]; // just normalized: the best end is at 0
    const auto best = std::find(end, end + plan_.steps[last].kept, uint16_t{0}) - end;
    const uint32_t state = trace(rows_.state_before(last, static_cast<uint32_t>(best), x_), seam, false);
    path_[seam] = static_cast<uint16_t>(state);
    if (clipped(last))
        return false;
    if (trace(state, seam, true) == state)
        return !clipped(last - 1);

    uint16_t* start = rows_[lead];
    std::fill_n(start, plan_.steps[seam].kept, trellis_row_most);
    start[state & (plan_.steps[seam].kept - 1)] = 0;
    pass(lead);
    path_[lead] = static_cast<uint16_t>(trace(state, lead, false));
    return !clipped(last - 1); // which says as well that the path does not start where rows are full
}

bool TrellisSearch::find(const float* x, uint16_t* states) {
    const float fixed = static_cast<float>(plan_.fixed), most = 512 * fixed - 1; // 3.46 deviations, where levels end
    for (int i = 0; i < trellis_weights; ++i)
        x_[i] = static_cast<int16_t>(std::lrint(std::clamp(x[i] * fixed, -most, most)));
    const bool found = search();
    if (!found)
        trellis_search_exactly(plan_.code, plan_.levels, x_, plan_.lead, path_.data());
    for (int i = 0; i < trellis_weights; ++i)
        states[i] = path_[plan_.last - i];
    return found;
}

} // namespace bitpalette
