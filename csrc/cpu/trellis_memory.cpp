#include "trellis_memory.h"

#include <algorithm>

namespace bitpalette {
namespace {

// `count` rows, each at an address that is a multiple of 64, for vectors.
class RowBlock {
  public:
    RowBlock(int row_size, int count)
        : row_size_(static_cast<size_t>(row_size)), memory_(row_size_ * static_cast<size_t>(count) + 32) {}

    uint16_t* operator[](int i) {
        const uintptr_t first = (reinterpret_cast<uintptr_t>(memory_.data()) + 63) & ~uintptr_t{63};
        return reinterpret_cast<uint16_t*>(first) + row_size_ * static_cast<size_t>(i);
    }

  private:
    size_t row_size_; // at least 2^11
    std::vector<uint16_t> memory_;
};

class KeptRows : public TrellisMemory {
  public:
    explicit KeptRows(const TrellisPlan& plan)
        : plan_(plan), every_(plan.code.window == 12 || plan.code.m >= 48 ? 1 : plan.code.m >= 32 ? 2 : 4),
          first_(plan.lead - every_), passing_(plan.row_size, 2),
          kept_(plan.row_size, trellis_weights / every_ + 2) {}

    uint16_t* row(int step) override {
        return step < first_ || step % every_ != 0 ? passing_[step & 1] : kept_[(step - first_) / every_];
    }

    uint32_t* better(int) override { return nullptr; }

    uint32_t state_before(int step, uint32_t kept, const int16_t* x) override {
        const TrellisPlan::Step& s = plan_.steps[step];
        const int16_t* levels = plan_.levels + kept;
        int32_t least = INT32_MAX; // cost * 32 + h
        if (step % every_ == 0) {
            const uint16_t* from = row(step) + (kept >> s.expand);
            for (int32_t h = 0; h < 1 << s.fold; ++h, levels += s.kept, from += s.kept >> s.expand)
                least = std::min(least, (*from + trellis_metric(x[s.weight], *levels)) << 5 | h);
        } else {
            for (int32_t h = 0; h < 1 << s.fold; ++h, levels += s.kept) {
                const int32_t from = cost(step, (h * s.kept + kept) >> s.expand, x);
                least = std::min(least, (from + trellis_metric(x[s.weight], *levels)) << 5 | h);
            }
        }
        return (least & 31) * s.kept + kept;
    }

  private:
    // An element of a row; of one that was not kept it is computed again.
    int32_t cost(int step, uint32_t t, const int16_t* x) {
        if (step % every_ == 0)
            return row(step)[t];
        const TrellisPlan::Step& s = plan_.steps[step - 1];
        int32_t least = trellis_row_most;
        for (uint32_t h = 0; h < 1u << s.fold; ++h) {
            const uint32_t state = h * s.kept + t;
            const int32_t from = cost(step - 1, state >> s.expand, x);
            least = std::min(least, from + trellis_metric(x[s.weight], plan_.levels[state]));
        }
        return least;
    }

    const TrellisPlan& plan_;
    int every_, first_; // steps
    RowBlock passing_, kept_;
};

class KeptDecisions : public TrellisMemory {
  public:
    explicit KeptDecisions(const TrellisPlan& plan) : plan_(plan), rows_(plan.row_size, 3) {
        size_t size = 0;
        for (int step = plan.seam; step <= plan.last; ++step) {
            const TrellisPlan::Step& s = plan.steps[step];
            first_.push_back(size);
            size += static_cast<size_t>(s.kept / lanes) * ((1 << s.fold) - 1);
        }
        decisions_.resize(size + first_.size());
    }

    uint16_t* row(int step) override { return rows_[step == plan_.lead ? 2 : step & 1]; }

    uint32_t* better(int step) override {
        return step < plan_.seam ? nullptr : decisions_.data() + first_[step - plan_.seam];
    }

    uint32_t state_before(int step, uint32_t kept, const int16_t*) override {
        const TrellisPlan::Step& s = plan_.steps[step];
        const uint32_t within = 1u << s.expand, runs = lanes / within, t = kept % lanes;
        const uint32_t lane = t % within * runs + t / within; // the order of levels: trellis_levels.h
        uint32_t h = (1u << s.fold) - 1;
        const uint32_t* better = this->better(step) + kept / lanes * h;
        while (h > 0 && !(better[h - 1] >> lane & 1))
            --h;
        return h * s.kept + kept;
    }

  private:
    static constexpr int lanes = 32;

    const TrellisPlan& plan_;
    RowBlock rows_;
    std::vector<size_t> first_; // of a step's decisions, from the seam on
    std::vector<uint32_t> decisions_;
};

} // namespace

std::unique_ptr<TrellisMemory> trellis_keep_rows(const TrellisPlan& plan) {
    return std::make_unique<KeptRows>(plan);
}

std::unique_ptr<TrellisMemory> trellis_keep_decisions(const TrellisPlan& plan) {
    return std::make_unique<KeptDecisions>(plan);
}

} // namespace bitpalette
