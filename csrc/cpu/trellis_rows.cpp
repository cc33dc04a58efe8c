#include "trellis_rows.h"

#include <algorithm>

namespace bitpalette {
namespace {

// Rows of 2 to 4 MiB in all, as far as the cone stays below a hundred states a step: measured at 2 MiB of cache.
int rows_apart(const TrellisCode& code) {
    if (code.window == 12)
        return 1;
    if (code.window == 14)
        return code.m < 32 ? 4 : code.m < 48 ? 2 : 1;
    return code.m < 36 ? 4 : code.m < 48 ? 2 : 1;
}

// The least of costs << 5 | number, which is the cheapest and of equals the first. Four chains of comparisons.
template <class Cost>
uint32_t cheapest(int count, const Cost& cost) {
    uint32_t least[4] = {UINT32_MAX, UINT32_MAX, UINT32_MAX, UINT32_MAX};
    if (count == 2)
        return std::min(cost(0) << 5, cost(1) << 5 | 1);
    for (int h = 0; h < count; h += 4)
        for (int j = 0; j < 4; ++j)
            least[j] = std::min(least[j], cost(h + j) << 5 | static_cast<uint32_t>(h + j));
    return std::min(std::min(least[0], least[1]), std::min(least[2], least[3]));
}

} // namespace

TrellisRows::TrellisRows(const TrellisPlan& plan)
    : plan_(plan), every_(rows_apart(plan.code)), cone_(static_cast<size_t>(every_)) {
    const int first = plan.lead - every_; // of the rows that are kept; two others take turns
    const size_t size = static_cast<size_t>(plan.row_size), align = 64 / sizeof(uint16_t);
    memory_.resize(size * static_cast<size_t>(2 + 1 + (plan.last + 1 - first) / every_) + align);
    uint16_t* at = memory_.data() + align - reinterpret_cast<uintptr_t>(memory_.data()) / sizeof(uint16_t) % align;
    uint16_t* const passing[2] = {at, at + size};
    at += 2 * size;
    for (int step = 0; step <= plan.last + 1; ++step) {
        const bool kept = step >= first && step % every_ == 0;
        rows_.push_back(kept ? at : passing[step & 1]);
        at += kept ? size : 0;
    }
}

// Costs of all states, in the steps from the kept row before `last` to `last`, that lead to `low` after `last`.
void TrellisRows::compute_cone(int last, uint32_t low, const int16_t* x) {
    const int first = last - last % every_;
    uint32_t stride = static_cast<uint32_t>(plan_.steps[last].kept);
    size_t count = 1;
    for (int step = last; step >= first; --step) {
        const TrellisPlan::Step& s = plan_.steps[step];
        Level& level = cone_[step - first];
        count <<= s.fold;
        level.stride = stride, level.low = low;
        level.costs.resize(count);
        stride >>= s.expand, low >>= s.expand;
    }
    for (int step = first; step <= last; ++step) {
        const TrellisPlan::Step& s = plan_.steps[step];
        Level& level = cone_[step - first];
        const int32_t weight = x[s.weight];
        const int16_t* levels = plan_.levels + level.low;
        uint32_t* costs = level.costs.data();
        const size_t n = level.costs.size();
        if (step == first) {
            const uint16_t* from = (*this)[step] + low;
            for (size_t i = 0; i < n; ++i)
                costs[i] = from[i * stride];
        } else {
            const std::vector<uint32_t>& before = cone_[step - first - 1].costs;
            std::fill_n(costs, n, uint32_t{trellis_row_most});
            for (size_t h = 0; h < before.size(); h += n)
                for (size_t i = 0; i < n; ++i)
                    costs[i] = std::min(costs[i], before[h + i]);
        }
        for (size_t i = 0; i < n; ++i)
            costs[i] += trellis_metric(weight, levels[i * level.stride]);
    }
}

uint32_t TrellisRows::state_before(int step, uint32_t low, const int16_t* x) {
    const TrellisPlan::Step& s = plan_.steps[step];
    const uint32_t kept = static_cast<uint32_t>(s.kept);
    uint32_t best;
    if (every_ == 1) {
        const int32_t weight = x[s.weight];
        const uint16_t* from = (*this)[step] + (low >> s.expand);
        const int16_t* levels = plan_.levels + low;
        best = cheapest(1 << s.fold,
                        [=](int h) { return from[h * (kept >> s.expand)] + trellis_metric(weight, levels[h * kept]); });
    } else {
        if (step != next_ || (step + 1) % every_ == 0)
            compute_cone(step, low, x);
        next_ = step - 1;
        // of the costs of this step those whose states have the low bits
        const Level& level = cone_[step % every_];
        const uint32_t* costs = level.costs.data() + (low - level.low) / level.stride;
        best = cheapest(1 << s.fold, [=](int h) { return costs[h * (kept / level.stride)]; });
    }
    return (best & 31) * kept + low;
}

} // namespace bitpalette
