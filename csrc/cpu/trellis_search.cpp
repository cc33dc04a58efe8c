#include "trellis_search.h"

#include <algorithm>

#include "trellis_exact.h"

namespace bitpalette {

TrellisSearch::Tile::Tile(const TrellisPlan& plan)
    : rows(plan), path(plan.steps.size()), subtracted(plan.steps.size() + 1) {}

TrellisSearch::TrellisSearch(const TrellisStepUnit& unit, const TrellisCode& code) : plan_(unit, code) {
    tiles_.reserve(trellis_most_tiles);
}

void TrellisSearch::take(Tile& tile, const float* x) const {
    const float fixed = static_cast<float>(plan_.fixed), most = 512 * fixed - 1; // 3.46 deviations, where levels end
    constexpr float round = 3 << 22; // added, it leaves no bits for fractions; a call of lrint each took 1 % at L = 12
    for (int i = 0; i < trellis_weights; ++i)
        tile.x[i] = static_cast<int16_t>(std::clamp(x[i] * fixed, -most, most) + round - round);
}

// Whether the memory of the row that enters a step is fetched while the step two before it runs: 6 % of the search at 2
// bits and L = 16, where the rows that are kept outgrow the second-level cache.
bool TrellisSearch::fetches_row(int step) const {
    return step <= plan_.last && tiles_[0].rows.kept(step) && plan_.steps[step - 1].kept == plan_.steps[step - 2].kept;
}

// Advances the first tiles, all of them step by step.
void TrellisSearch::pass(int first, int count) {
    for (int step = first; step <= plan_.last; ++step) {
        const TrellisPlan::Step& s = plan_.steps[step];
        TrellisStep task{s.levels, {}, {}, {}, {}, plan_.code.window, s.expand, s.fold};
        for (int k = 0; k < count; ++k) {
            const Tile& tile = tiles_[k];
            task.from[k] = tile.rows[step];
            task.to[k] = tiles_[k].rows[step + 1];
            task.later[k] = fetches_row(step + 2) ? tile.rows[step + 2] : task.to[k];
            task.x[k] = tile.x[s.weight];
        }
        s.run[count - 1](task);
        const bool normalize = (step + 1) % TrellisPlan::normalize_every == 0;
        for (int k = 0; k < count; ++k)
            tiles_[k].subtracted[step + 1] = normalize ? plan_.unit.normalize(task.to[k], s.kept) : uint16_t{0};
    }
}

// Follows the best paths that end in `states` back to the step `stop`, and puts there where they are then. All of them
// at once: where one waits for memory another goes on.
void TrellisSearch::trace(int count, uint32_t* states, int stop) {
    for (int step = plan_.last; step > stop; --step)
        for (int k = 0; k < count; ++k) {
            Tile& tile = tiles_[k];
            tile.path[step] = static_cast<uint16_t>(states[k]);
            states[k] = tile.rows.state_before(step - 1, states[k] >> plan_.steps[step].expand, tile.x);
        }
}

// Follows the best path that ends in `state` back until it falls in with the one that is already there. Returns the
// state at the seam.
uint32_t TrellisSearch::trace_back(Tile& tile, uint32_t state) const {
    for (int step = plan_.last; step > plan_.seam; --step) {
        if (step < plan_.last && tile.path[step] == state)
            return tile.path[plan_.seam];
        tile.path[step] = static_cast<uint16_t>(state);
        state = tile.rows.state_before(step - 1, state >> plan_.steps[step].expand, tile.x);
    }
    return state;
}

// Whether a cost that the traceback compared, up to the one of step `last`, does not fit a row.
bool TrellisSearch::clipped(const Tile& tile, int last) const {
    const int lead = plan_.lead;
    uint32_t cost = tile.rows[lead][tile.path[lead] >> plan_.steps[lead].expand];
    if (cost + tile.subtracted[lead] >= trellis_row_most)
        return true;
    for (int step = lead; step <= last; ++step) {
        cost += trellis_metric(tile.x[plan_.steps[step].weight], plan_.levels[tile.path[step]]);
        if (cost >= trellis_row_most)
            return true;
        cost -= tile.subtracted[step + 1];
    }
    return false;
}

// The best paths of the first tiles, each in its tile, and the states in which they cross the seam.
void TrellisSearch::first_pass(const float* x, int count, uint32_t* seams) {
    for (int k = 0; k < count; ++k) {
        take(tiles_[k], x + k * trellis_weights);
        std::fill_n(tiles_[k].rows[0], plan_.row_size, uint16_t{0});
    }
    pass(0, count);
    for (int k = 0; k < count; ++k) {
        Tile& tile = tiles_[k];
        const uint16_t* end = tile.rows[plan_.last + 1]; // just normalized: the best end is at 0
        const auto best = std::find(end, end + plan_.steps[plan_.last].kept, uint16_t{0}) - end;
        seams[k] = tile.rows.state_before(plan_.last, static_cast<uint32_t>(best), tile.x);
    }
    trace(count, seams, plan_.seam);
}

// Replaces a tile's best path by the best one that ends where it crosses the seam.
TrellisSearch::Outcome TrellisSearch::close(Tile& tile, uint32_t seam) const {
    tile.path[plan_.seam] = static_cast<uint16_t>(seam);
    if (clipped(tile, plan_.last))
        return Outcome::clipped;
    if (trace_back(tile, seam) != seam)
        return Outcome::not_cyclic;
    return clipped(tile, plan_.last - 1) ? Outcome::clipped : Outcome::found;
}

// The best paths of the first tiles that begin and end in states of the seam.
void TrellisSearch::second_pass(const float* x, const Open* open, int count) {
    const int lead = plan_.lead, kept = plan_.steps[plan_.seam].kept;
    uint32_t states[trellis_most_tiles];
    for (int k = 0; k < count; ++k) {
        Tile& tile = tiles_[k];
        take(tile, x + open[k].number * trellis_weights);
        std::fill_n(tile.rows[lead], kept, trellis_row_most);
        tile.rows[lead][static_cast<int>(open[k].seam) & (kept - 1)] = 0;
        tile.subtracted[lead] = 0;
        states[k] = open[k].seam;
    }
    pass(lead, count);
    trace(count, states, lead);
    for (int k = 0; k < count; ++k)
        tiles_[k].path[lead] = static_cast<uint16_t>(states[k]);
}

// The tile's states. Returns 1 where the exact search had to find them.
int TrellisSearch::give(Tile& tile, Outcome outcome, uint16_t* states) const {
    if (outcome == Outcome::clipped)
        trellis_search_exactly(plan_.code, plan_.levels, tile.x, plan_.lead, tile.path.data());
    for (int i = 0; i < trellis_weights; ++i)
        states[i] = tile.path[plan_.last - i];
    return outcome == Outcome::clipped;
}

int TrellisSearch::find(const float* x, int count, uint16_t* states) {
    const int most = std::min(count, plan_.together);
    while (static_cast<int>(tiles_.size()) < most)
        tiles_.emplace_back(plan_);
    int exact = 0;
    std::vector<Open> open;
    for (int first = 0; first < count; first += most) {
        const int together = std::min(count - first, most);
        uint32_t seams[trellis_most_tiles];
        first_pass(x + first * trellis_weights, together, seams);
        for (int k = 0; k < together; ++k) {
            const Outcome outcome = close(tiles_[k], seams[k]);
            if (outcome == Outcome::not_cyclic)
                open.push_back({first + k, seams[k]});
            else
                exact += give(tiles_[k], outcome, states + (first + k) * trellis_weights);
        }
    }
    for (int first = 0; first < static_cast<int>(open.size()); first += most) {
        const int together = std::min(static_cast<int>(open.size()) - first, most);
        second_pass(x, open.data() + first, together);
        for (int k = 0; k < together; ++k) {
            // where the path starts in a full place of the row it says so, too
            const Outcome outcome = clipped(tiles_[k], plan_.last - 1) ? Outcome::clipped : Outcome::found;
            exact += give(tiles_[k], outcome, states + open[first + k].number * trellis_weights);
        }
    }
    return exact;
}

} // namespace bitpalette
