#include "trellis_decode.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "parallel.h"
#include "trellis_linear_unit.h"

namespace bitpalette {
namespace {

// Below this many weights a thread, waking another thread (about 2 us) costs more than it saves.
constexpr int64_t weights_per_thread = 64 << 10;

} // namespace

void trellis_check(const TrellisCode& code) {
    if (code.m < trellis_least_bits || code.m > trellis_most_bits)
        throw std::invalid_argument("trellis: " + std::to_string(code.m) + " bits for 16 weights, not 16 to 80");
    if (code.window != 12 && code.window != 14 && code.window != 16)
        throw std::invalid_argument("trellis: a window of " + std::to_string(code.window) + " bits, not 12, 14 or 16");
}

void trellis_decode(Isa isa, const TrellisWeight& w, const int64_t* index, int64_t n, float* y, int threads) {
    const TrellisLinearUnit unit = trellis_linear_unit(isa, w);
    if (index == nullptr && n != 0 && n != w.out) // an empty index may have no address
        throw std::invalid_argument("trellis: " + std::to_string(n) + " rows of " + std::to_string(w.out));
    for (int64_t i = 0; index != nullptr && i < n; ++i)
        if (index[i] < 0 || index[i] >= w.out)
            throw std::invalid_argument("trellis: row " + std::to_string(index[i]) + " of " + std::to_string(w.out));
    struct Call {
        TrellisDecode decode;
        const TrellisWeight& w;
        const int64_t* index;
        float* y;
    } call{unit.decode, w, index, y};
    const auto body = [](void* context, int64_t begin, int64_t end) {
        const Call& c = *static_cast<const Call*>(context);
        c.decode(c.w, c.index, begin, end, c.y);
    };
    const int64_t useful = n * w.in / weights_per_thread;
    parallel_for(n, static_cast<int>(std::clamp<int64_t>(useful, 1, std::max(threads, 1))), body, &call);
}

} // namespace bitpalette
