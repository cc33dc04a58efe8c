// The step without special instructions.
#include <algorithm>

#include "trellis_step.h"

namespace bitpalette {
namespace {

template <int Tiles>
void step(const TrellisStep& s) {
    const int n = 1 << (s.window - s.fold);
    for (int tile = 0; tile < Tiles; ++tile)
        for (int h = 0; h < 1 << s.fold; ++h) {
            const int16_t* levels = s.levels + (h << (s.window - s.fold));
            const uint16_t* from = s.from[tile] + ((h << (s.window - s.fold)) >> s.expand);
            uint16_t* to = s.to[tile];
            for (int t = 0; t < n; ++t) {
                const int d = std::clamp(s.x[tile] - levels[t], -32768, 32767);
                const uint16_t cost = static_cast<uint16_t>(from[t >> s.expand] + ((d * d + (1 << 14)) >> 15));
                to[t] = h == 0 ? std::min(cost, trellis_row_most) : std::min(cost, to[t]);
            }
        }
}

void cone(const TrellisCone& c) {
    for (int i = 0; i < c.n; ++i) {
        uint32_t least = trellis_row_most;
        for (int h = 0; h < c.folded; ++h)
            least = std::min(least, c.before[h * c.n + i]);
        const int level = trellis_level(c.low + static_cast<uint32_t>(i) * c.stride);
        const uint32_t d = static_cast<uint32_t>(c.x - c.fixed * level);
        c.costs[i] = least + ((d * d + (1u << 14)) >> 15);
    }
}

uint16_t normalize(uint16_t* row, int n) {
    const uint16_t least = *std::min_element(row, row + n);
    for (int t = 0; t < n; ++t)
        row[t] = static_cast<uint16_t>(row[t] - least);
    return least;
}

constexpr TrellisStepUnit make_unit() {
    TrellisStepUnit unit{1, {}, cone, normalize};
    for (auto& steps : unit.step)
        for (int expand = 0; expand < trellis_most_step; ++expand)
            for (int change = 0; change < 3; ++change) {
                steps[0][expand][change] = step<1>;
                steps[1][expand][change] = step<2>;
            }
    return unit;
}

} // namespace

constexpr TrellisStepUnit trellis_step_scalar = make_unit();

} // namespace bitpalette
