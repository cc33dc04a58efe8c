#include "trellis_search.h"

#include <algorithm>
#include <cmath>

#include "trellis_exact.h"
#include "trellis_levels.h"

namespace bitpalette {
namespace {

// Steps between two subtractions of a row's least value, which is what keeps rows below 32767.
constexpr int normalize_every = 8;

// Steps before the seam, whole eighths so that every pass begins on a kept, normalized row. A path takes 2 to 3 windows
// (L / rate weights) to forget where it began; this many lose .01 to .015 dB against 160 at L = 12, a third as many .04.
int lead_steps(const TrellisCode& code) {
    const double steps = code.window * (0.5 + 72.0 / code.m);
    return std::max(16, static_cast<int>(std::lround(steps / normalize_every)) * normalize_every);
}

// Rows are kept for the traceback. 256 of them leave the second-level cache where steps are short and windows long, and
// that takes longer than computing what lies between two of them again, for the one path that is traced.
int rows_between(const TrellisCode& code) {
    return code.window == 12 || code.m >= 48 ? 1 : code.m >= 32 ? 2 : 4;
}

// The first address from p on that is a multiple of 64, for vectors. There must be 62 bytes to spare.
uint16_t* aligned(uint16_t* p) {
    return reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(p) + 63) & ~uintptr_t{63});
}

constexpr size_t spare = 32;

int32_t metric(int32_t x, int32_t level) {
    const int32_t d = std::clamp(x - level, -32768, 32767);
    return (d * d + (1 << 14)) >> 15;
}

} // namespace

TrellisSearch::TrellisSearch(const TrellisStepUnit& unit, const TrellisCode& code)
    : unit_(unit), code_(code), fixed_(trellis_fixed(code.m)),
      levels_(trellis_levels(fixed_, code.window, 1, 0, 0)), keep_every_(rows_between(code)), lead_(lead_steps(code)),
      seam_(lead_ - 1), last_(lead_ + trellis_weights - 1), row_size_(1 << (code.window - code.step(0))) {
    for (int step = 0; step <= last_; ++step) {
        const int weight = trellis_weight_of_step(lead_, step);
        const int expand = code.step(weight), fold = code.step(trellis_weight_of_step(lead_, step + 1));
        const int16_t* levels = trellis_levels(fixed_, code.window, unit.lanes, expand, fold);
        steps_.push_back({weight, expand, fold, 1 << (code.window - fold), levels});
    }
    kept_rows_.resize(static_cast<size_t>(row_size_) * (trellis_weights / keep_every_ + 2) + spare);
    passing_rows_.resize(static_cast<size_t>(row_size_) * 2 + spare);
    path_.resize(steps_.size());
}

// What enters a step: A_i of the step's weight i.
uint16_t* TrellisSearch::row(int step) {
    const int first_kept = lead_ - keep_every_;
    if (step < first_kept || step % keep_every_ != 0)
        return aligned(passing_rows_.data()) + static_cast<size_t>(row_size_) * (step & 1);
    return aligned(kept_rows_.data()) + static_cast<size_t>(row_size_) * ((step - first_kept) / keep_every_);
}

void TrellisSearch::pass(int first) {
    for (int step = first; step <= last_; ++step) {
        const Step& s = steps_[step];
        uint16_t* to = row(step + 1);
        unit_.step[s.expand - 1][s.fold - s.expand + 1](
            {s.levels, row(step), to, code_.window, s.expand, s.fold, x_[s.weight]});
        if ((step + 1) % normalize_every == 0)
            unit_.normalize(to, s.kept);
    }
}

// An element of a row; of those that were not kept it is computed again.
int32_t TrellisSearch::cost(int row_step, uint32_t t) const {
    if (row_step % keep_every_ == 0)
        return row(row_step)[t];
    const Step& s = steps_[row_step - 1];
    int32_t least = trellis_row_most;
    for (uint32_t h = 0; h < 1u << s.fold; ++h) {
        const uint32_t state = h * s.kept + t;
        least = std::min(least, cost(row_step - 1, state >> s.expand) + metric(x_[s.weight], levels_[state]));
    }
    return least;
}

// The state of a step from the low bits that the next one keeps of it: the cheapest, of equals the first.
uint32_t TrellisSearch::state_before(int step, uint32_t kept) {
    const Step& s = steps_[step];
    const int32_t x = x_[s.weight];
    const int16_t* levels = levels_ + kept;
    int32_t least = INT32_MAX; // cost * 32 + h
    if (step % keep_every_ == 0) {
        const uint16_t* from = row(step) + (kept >> s.expand);
        for (int32_t h = 0; h < 1 << s.fold; ++h, levels += s.kept, from += s.kept >> s.expand)
            least = std::min(least, (*from + metric(x, *levels)) << 5 | h);
    } else {
        for (int32_t h = 0; h < 1 << s.fold; ++h, levels += s.kept)
            least = std::min(least, (cost(step, (h * s.kept + kept) >> s.expand) + metric(x, *levels)) << 5 | h);
    }
    clipped_ = clipped_ || least >> 5 > trellis_row_most;
    return (least & 31) * s.kept + kept;
}

// Follows the best path that ends in `state` back to the step after `stop`, where `join` until it falls in with the one
// that is already there. Returns the state at `stop`.
uint32_t TrellisSearch::trace(uint32_t state, int stop, bool join) {
    for (int step = last_; step > stop; --step) {
        if (join && step < last_ && path_[step] == state)
            return path_[stop];
        path_[step] = static_cast<uint16_t>(state);
        state = state_before(step - 1, state >> steps_[step].expand);
    }
    return state;
}

bool TrellisSearch::search() {
    clipped_ = false;
    std::fill_n(row(0), row_size_, uint16_t{0});
    pass(0);
    const uint16_t* end = row(last_ + 1);
    const auto best = std::find(end, end + steps_[last_].kept, uint16_t{0}) - end; // its row has just been normalized
    const uint32_t seam = trace(state_before(last_, static_cast<uint32_t>(best)), seam_, false);
    path_[seam_] = static_cast<uint16_t>(seam);
    if (trace(seam, seam_, true) == seam)
        return !clipped_;

    uint16_t* start = row(lead_);
    const uint32_t kept = seam & (steps_[seam_].kept - 1);
    std::fill_n(start, steps_[seam_].kept, trellis_row_most);
    start[kept] = 0;
    pass(lead_);
    const uint32_t first = trace(seam, lead_, false);
    path_[lead_] = static_cast<uint16_t>(first);
    return !clipped_ && first >> steps_[lead_].expand == kept; // else it came from a clipped cost
}

bool TrellisSearch::find(const float* x, uint16_t* states) {
    const float most = static_cast<float>(512 * fixed_ - 1); // 3.46 deviations, as far as levels go
    for (int i = 0; i < trellis_weights; ++i)
        x_[i] = static_cast<int16_t>(std::lrint(std::clamp(x[i] * static_cast<float>(fixed_), -most, most)));
    const bool found = search();
    if (!found)
        trellis_search_exactly(code_, levels_, x_, lead_, path_.data());
    for (int i = 0; i < trellis_weights; ++i)
        states[i] = path_[last_ - i];
    return found;
}

} // namespace bitpalette
