#include "trellis_rows.h"

#include <algorithm>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bitpalette {
namespace {

constexpr size_t huge_page = size_t{2} << 20;
constexpr size_t cone_room = 15; // TrellisCone

// Measured with tiles in pairs and 2 MiB of second-level cache. Fewer rows take less of it, but the cone, whose costs
// each come from a cache line of their own, doubles with every bit: beyond some 200 states it costs more than it saves.
int rows_apart(const TrellisCode& code) {
    const int m = code.m;
    if (code.window == 12)
        return 1;
    if (code.window == 14)
        return m < 30 ? 4 : m < 44 ? 2 : 1;
    return m < 20 ? 6 : m < 32 ? 4 : m < 36 ? 3 : m < 48 ? 2 : 1;
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

// Huge pages, where the system gives them: rows are read in strides, and of 4 KiB each page that a stride meets has to
// be looked up. Below half of one it would be mostly empty.
uint16_t* allocate(size_t elements) {
    const size_t bytes = (elements * sizeof(uint16_t) + huge_page - 1) / huge_page * huge_page;
    void* memory = ::operator new(bytes, std::align_val_t{huge_page});
#ifdef MADV_HUGEPAGE
    if (2 * elements * sizeof(uint16_t) >= huge_page)
        madvise(memory, bytes, MADV_HUGEPAGE); // advice: where it is not taken all is as it was
#endif
    return static_cast<uint16_t*>(memory);
}

} // namespace

void TrellisRows::Free::operator()(uint16_t* memory) const {
    ::operator delete(memory, std::align_val_t{huge_page});
}

TrellisRows::TrellisRows(const TrellisPlan& plan)
    : plan_(plan), every_(rows_apart(plan.code)), first_(plan.lead - every_), cone_(static_cast<size_t>(every_)) {
    const size_t size = static_cast<size_t>(plan.row_size);
    const size_t rows = static_cast<size_t>(2 + 1 + (plan.last + 1 - first_) / every_);
    memory_.reset(allocate(size * rows));
    uint16_t* at = memory_.get();
    uint16_t* const passing[2] = {at, at + size}; // rows that are not kept take turns
    at += 2 * size;
    for (int step = 0; step <= plan.last + 1; ++step) {
        rows_.push_back(kept(step) ? at : passing[step & 1]);
        at += kept(step) ? size : 0;
    }
}

// Costs of all states, in the steps from the kept row before `last` to `last`, that lead to `low` after `last`.
void TrellisRows::compute_cone(int last, uint32_t low, const int16_t* x) {
    const int first = last - (last - first_) % every_;
    uint32_t stride = static_cast<uint32_t>(plan_.steps[last].kept);
    size_t count = 1;
    for (int step = last; step >= first; --step) {
        const TrellisPlan::Step& s = plan_.steps[step];
        Level& level = cone_[step - first];
        count <<= s.fold;
        level.stride = stride, level.low = low;
        level.costs.resize(count + cone_room);
        stride >>= s.expand, low >>= s.expand;
    }
    wanted_.resize(count + cone_room);
    const uint16_t* from = (*this)[first] + low;
    for (size_t i = 0; i < count; ++i)
        wanted_[i] = from[i * stride];
    const uint32_t* before = wanted_.data();
    for (int step = first, folded = 1; step <= last; ++step) {
        const TrellisPlan::Step& s = plan_.steps[step];
        Level& level = cone_[step - first];
        plan_.unit.cone({before, level.costs.data(), folded, static_cast<int>(count), level.low, level.stride,
                         x[s.weight], plan_.fixed});
        before = level.costs.data();
        folded = 1 << s.fold;
        count >>= s.fold;
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
        if (step != next_ || (step + 1 - first_) % every_ == 0)
            compute_cone(step, low, x);
        next_ = step - 1;
        // of the costs of this step those whose states have the low bits
        const Level& level = cone_[(step - first_) % every_];
        const uint32_t* costs = level.costs.data() + (low - level.low) / level.stride;
        best = cheapest(1 << s.fold, [=](int h) { return costs[h * (kept / level.stride)]; });
    }
    return (best & 31) * kept + low;
}

} // namespace bitpalette
