#include "trellis_decode.h"

#include <stdexcept>
#include <string>

#include "parallel.h"
#include "trellis_linear_unit.h"

namespace bitpalette {

void trellis_check(const TrellisCode& code) {
    if (code.m < trellis_least_bits || code.m > trellis_most_bits)
        throw std::invalid_argument("trellis: " + std::to_string(code.m) + " bits for 16 weights, not 16 to 80");
    if (code.window != 12 && code.window != 14 && code.window != 16)
        throw std::invalid_argument("trellis: a window of " + std::to_string(code.window) + " bits, not 12, 14 or 16");
}

void trellis_decode(Isa isa, const TrellisWeight& w, const int64_t* index, int64_t n, float* y, int threads) {
    const TrellisDecoder decoder = trellis_decoder(isa, w);
    if (index == nullptr && n != 0 && n != w.out) // an empty index may have no address
        throw std::invalid_argument("trellis: " + std::to_string(n) + " rows of " + std::to_string(w.out));
    for (int64_t i = 0; index != nullptr && i < n; ++i)
        if (index[i] < 0 || index[i] >= w.out)
            throw std::invalid_argument("trellis: row " + std::to_string(index[i]) + " of " + std::to_string(w.out));
    struct Call {
        const TrellisDecoder& decoder;
        const TrellisWeight& w;
        const int64_t* index;
        float* y;
    } call{decoder, w, index, y};
    const auto body = [](void* context, int64_t begin, int64_t end) {
        const Call& c = *static_cast<const Call*>(context);
        c.decoder.unit.decode(c.w, c.decoder.windows, c.index, begin, end, c.y, trellis_pieces_room(c.w));
    };
    parallel_for(n, trellis_threads(n * w.in, threads), body, &call);
}

} // namespace bitpalette
