#include "trellis_search.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>

namespace bitpalette {
namespace {

// Steps between two subtractions of a row's least value, which is what keeps rows below 32767.
constexpr int normalize_every = 8;

constexpr uint64_t unreachable = uint64_t{1} << 60;

// The first address from p on that is a multiple of 64, for vectors. There must be 62 bytes to spare.
template <class T>
T* aligned(T* p) {
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(p) + 63) & ~uintptr_t{63});
}

// Levels in sixty-fourths, in the order in which a step of (expand, fold) reads vectors of `lanes` states; made once.
const int16_t* level_table(int lanes, int window, int expand, int fold) {
    static std::mutex mutex;
    static std::map<std::tuple<int, int, int, int>, std::vector<int16_t>> tables;
    if (lanes == 1)
        expand = fold = 0;
    const std::lock_guard<std::mutex> locked(mutex);
    std::vector<int16_t>& table = tables[{lanes, window, expand, fold}];
    if (table.empty()) {
        table.resize((size_t{1} << window) + 32);
        int16_t* at = aligned(table.data());
        const int block = 1 << (window - fold), within = std::min(1 << expand, lanes), runs = lanes / within;
        for (int first = 0; first < block; first += lanes)
            for (int h = 0; h < 1 << fold; ++h)
                for (int lane = 0; lane < lanes; ++lane) {
                    const int t = first + lane % runs * within + lane / runs;
                    *at++ = static_cast<int16_t>(trellis_fixed * trellis_level(static_cast<uint32_t>(h * block + t)));
                }
    }
    return aligned(table.data());
}

int32_t metric(int32_t x, int32_t level) {
    const int32_t d = std::clamp(x - level, -32768, 32767);
    return (d * d + (1 << 14)) >> 15;
}

uint64_t exact_metric(int32_t x, int32_t level) {
    const int64_t d = x - level;
    return static_cast<uint64_t>(d * d);
}

} // namespace

TrellisSearch::TrellisSearch(const TrellisStepUnit& unit, const TrellisCode& code)
    : unit_(unit), code_(code), levels_(level_table(1, code.window, 0, 0)) {
    lead_ = 64;
    row_size_ = 1 << (code.window - code.step(0));
    for (int step = 0; step < lead_ + trellis_weights; ++step) {
        const int i = (lead_ - 1 - step) & 255, expand = code.step(i), fold = code.step((i - 1) & 255);
        steps_.push_back({i, expand, fold, level_table(unit.lanes, code.window, expand, fold)});
    }
    rows_.resize(static_cast<size_t>(row_size_) * (trellis_weights + 2) + 32);
    lead_rows_.resize(static_cast<size_t>(row_size_) * 2 + 32);
    path_.resize(steps_.size());
}

// What enters a step. Rows before the seam are not kept, but for the one that the seam's own step reads.
uint16_t* TrellisSearch::row(int step) {
    if (step < lead_ - 1)
        return aligned(lead_rows_.data()) + static_cast<size_t>(row_size_) * (step & 1);
    return aligned(rows_.data()) + static_cast<size_t>(row_size_) * (step - (lead_ - 1));
}

// The state of a step from the low bits that the next one keeps of it: the cheapest, of equals the first.
uint16_t TrellisSearch::state_before(int step, uint32_t kept) const {
    const Step& s = steps_[step];
    const uint16_t* from = row(step);
    uint32_t best = 0;
    int32_t least = 1 << 30;
    for (uint32_t h = 0; h < 1u << s.fold; ++h) {
        const uint32_t state = h << (code_.window - s.fold) | kept;
        const int32_t cost = from[state >> s.expand] + metric(x_[s.weight], levels_[state]);
        if (cost < least)
            least = cost, best = state;
    }
    return static_cast<uint16_t>(best);
}

bool TrellisSearch::search() {
    const int count = static_cast<int>(steps_.size()), last = count - 1, seam = lead_ - 1;
    std::fill_n(row(0), row_size_, uint16_t{0});
    for (int step = 0; step < count; ++step) {
        const Step& s = steps_[step];
        unit_.step[s.expand - 1][s.fold - s.expand + 1]({s.levels, row(step), row(step + 1), code_.window, s.expand, s.fold, x_[s.weight]});
        if (step % normalize_every == normalize_every - 1)
            unit_.normalize(row(step + 1), 1 << (code_.window - s.fold));
    }
    // The seam's state is the one that the best path of all passes through: before it lie lead_ weights, after it 256.
    const uint16_t* end = row(count);
    const int size = 1 << (code_.window - steps_[last].fold);
    uint32_t kept = static_cast<uint32_t>(std::min_element(end, end + size) - end);
    for (int step = last; step >= seam; --step) {
        path_[step] = state_before(step, kept);
        kept = path_[step] >> steps_[step].expand;
    }
    // From the same state at the end, the best path joins that one within a few windows; if so it is cyclic.
    path_[last] = path_[seam];
    for (int step = last; step > seam; --step) {
        const uint16_t before = state_before(step - 1, path_[step] >> steps_[step].expand);
        if (before == path_[step - 1] && step - 1 != seam)
            break;
        if (step - 1 == seam && before != path_[seam])
            return false;
        path_[step - 1] = before;
    }
    // A row's clipped cost may have won where the true one would not have; elsewhere costs are exact.
    for (int step = seam + 1; step < last; ++step) {
        const Step& s = steps_[step];
        if (row(step)[path_[step] >> s.expand] + metric(x_[s.weight], levels_[path_[step]]) > trellis_row_most)
            return false;
    }
    return true;
}

// The same search in 64 bits, where nothing is clipped. A free pass finds the seam's state, a second one starts there.
void TrellisSearch::search_exactly() {
    const int count = static_cast<int>(steps_.size()), last = count - 1, seam = lead_ - 1;
    decisions_.resize(static_cast<size_t>(row_size_) * count);
    for (auto& costs : costs_)
        costs.resize(static_cast<size_t>(row_size_));
    for (const int first : {0, seam + 1}) {
        std::fill(costs_[first & 1].begin(), costs_[first & 1].end(), first == 0 ? 0 : unreachable);
        if (first > 0)
            costs_[first & 1][path_[seam] & ((1u << (code_.window - steps_[seam].fold)) - 1)] = 0;
        for (int step = first; step < count; ++step)
            exact_step(step);
        uint32_t state = path_[seam];
        if (first == 0) { // the best of all ends
            const auto& end = costs_[count & 1];
            const int size = 1 << (code_.window - steps_[last].fold);
            const auto kept = std::min_element(end.begin(), end.begin() + size) - end.begin();
            state = exact_state_before(last, static_cast<uint32_t>(kept));
        }
        for (int step = last; step > seam; --step) {
            path_[step] = static_cast<uint16_t>(state);
            state = exact_state_before(step - 1, state >> steps_[step].expand);
        }
        if (first == 0)
            path_[seam] = static_cast<uint16_t>(state);
    }
}

void TrellisSearch::exact_step(int step) {
    const Step& s = steps_[step];
    const std::vector<uint64_t>& from = costs_[step & 1];
    std::vector<uint64_t>& to = costs_[(step + 1) & 1];
    uint8_t* decisions = decisions_.data() + static_cast<size_t>(row_size_) * step;
    const uint32_t size = 1u << (code_.window - s.fold);
    for (uint32_t h = 0; h < 1u << s.fold; ++h)
        for (uint32_t t = 0; t < size; ++t) {
            const uint32_t state = h * size + t;
            const uint64_t cost = from[state >> s.expand] + exact_metric(x_[s.weight], levels_[state]);
            if (h == 0 || cost < to[t])
                to[t] = cost, decisions[t] = static_cast<uint8_t>(h);
        }
}

uint32_t TrellisSearch::exact_state_before(int step, uint32_t kept) const {
    const uint32_t h = decisions_[static_cast<size_t>(row_size_) * step + kept];
    return h << (code_.window - steps_[step].fold) | kept;
}

bool TrellisSearch::find(const float* x, uint16_t* states) {
    for (int i = 0; i < trellis_weights; ++i)
        x_[i] = static_cast<int16_t>(std::lrint(std::clamp(x[i] * trellis_fixed, -32767.0f, 32767.0f)));
    const bool found = search();
    if (!found)
        search_exactly();
    const int last = static_cast<int>(steps_.size()) - 1;
    for (int i = 0; i < trellis_weights; ++i)
        states[i] = path_[last - i];
    return found;
}

} // namespace bitpalette
