// The step without special instructions.
#include <algorithm>

#include "trellis_step.h"

namespace bitpalette {
namespace {

void step(const TrellisStep& s) {
    const int n = 1 << (s.window - s.fold);
    for (int h = 0; h < 1 << s.fold; ++h) {
        const int16_t* levels = s.levels + (h << (s.window - s.fold));
        const uint16_t* from = s.from + ((h << (s.window - s.fold)) >> s.expand);
        for (int t = 0; t < n; ++t) {
            const int d = std::clamp(s.x - levels[t], -32768, 32767);
            const uint16_t cost = static_cast<uint16_t>(from[t >> s.expand] + ((d * d + (1 << 14)) >> 15));
            s.to[t] = h == 0 ? std::min(cost, trellis_row_most) : std::min(cost, s.to[t]);
        }
    }
}

uint16_t normalize(uint16_t* row, int n) {
    const uint16_t least = *std::min_element(row, row + n);
    for (int t = 0; t < n; ++t)
        row[t] = static_cast<uint16_t>(row[t] - least);
    return least;
}

} // namespace

const TrellisStepUnit trellis_step_scalar{
    1, {{step, step, step}, {step, step, step}, {step, step, step}, {step, step, step}, {step, step, step}}, normalize};

} // namespace bitpalette
