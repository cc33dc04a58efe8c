#include "trellis_exact.h"

#include <algorithm>
#include <vector>

namespace bitpalette {
namespace {

constexpr uint64_t unreachable = uint64_t{1} << 60;

class ExactSearch {
  public:
    ExactSearch(const TrellisCode& code, const int16_t* levels, const int16_t* x, int lead)
        : code_(code), levels_(levels), x_(x), lead_(lead), last_(lead + trellis_weights - 1),
          row_size_(size_t{1} << (code.window - code.step(0))), from_(row_size_), to_(row_size_),
          decisions_(row_size_ * static_cast<size_t>(lead + trellis_weights)) {}

    void find(uint16_t* path) {
        std::fill(from_.begin(), from_.end(), uint64_t{0});
        pass(0);
        const auto best = std::min_element(from_.begin(), from_.begin() + kept(last_)) - from_.begin();
        const uint32_t seam = trace(path, state_before(last_, static_cast<uint32_t>(best)));
        std::fill(from_.begin(), from_.end(), unreachable);
        from_[seam % kept(lead_ - 1)] = 0;
        pass(lead_);
        trace(path, seam);
    }

  private:
    int bits(int step) const { return code_.step(trellis_weight_of_step(lead_, step)); }
    // States that differ in what the step after this one keeps of them.
    uint32_t kept(int step) const { return 1u << (code_.window - bits(step + 1)); }

    void pass(int first) {
        for (int step = first; step <= last_; ++step) {
            const int32_t x = x_[trellis_weight_of_step(lead_, step)];
            const int expand = bits(step);
            uint8_t* decision = decisions_.data() + row_size_ * static_cast<size_t>(step);
            for (uint32_t state = 0; state < 1u << code_.window; ++state) {
                const int64_t d = x - levels_[state];
                const uint64_t cost = from_[state >> expand] + static_cast<uint64_t>(d * d);
                const uint32_t t = state % kept(step), h = state / kept(step);
                if (h == 0 || cost < to_[t])
                    to_[t] = cost, decision[t] = static_cast<uint8_t>(h);
            }
            std::swap(from_, to_);
        }
    }

    uint32_t state_before(int step, uint32_t t) const {
        return decisions_[row_size_ * static_cast<size_t>(step) + t] * kept(step) + t;
    }

    // Returns the state at the seam.
    uint32_t trace(uint16_t* path, uint32_t state) const {
        for (int step = last_; step >= lead_; --step) {
            path[step] = static_cast<uint16_t>(state);
            state = state_before(step - 1, state >> bits(step));
        }
        return state;
    }

    TrellisCode code_;
    const int16_t *levels_, *x_;
    int lead_, last_;
    size_t row_size_;
    std::vector<uint64_t> from_, to_;
    std::vector<uint8_t> decisions_; // which of the states that share their low bits was cheapest
};

} // namespace

void trellis_search_exactly(const TrellisCode& code, const int16_t* levels, const int16_t* x, int lead,
                            uint16_t* path) {
    ExactSearch(code, levels, x, lead).find(path);
}

} // namespace bitpalette
