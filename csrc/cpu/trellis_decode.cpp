#include "trellis_decode.h"

#include <stdexcept>
#include <string>
#include <vector>

#include "parallel.h"
#include "trellis_decode_unit.h"

namespace bitpalette {
namespace {

// Below this many weights a thread, waking another thread (about 2 us) costs more than it saves.
constexpr int64_t weights_per_thread = 64 << 10;

const TrellisDecodeUnit& unit_of(Isa isa) {
#if BITPALETTE_X86
    if (isa == Isa::avx512)
        return trellis_decode_avx512;
    if (isa == Isa::avx2)
        return trellis_decode_avx2;
#endif
    return trellis_decode_scalar;
}

int useful_threads(int64_t weights, int threads) {
    const int64_t useful = weights / weights_per_thread;
    return static_cast<int>(useful < 1 ? 1 : useful < threads ? useful : threads);
}

void check(Isa isa, const TrellisWeight& w) {
    if (!isa_available(isa))
        throw std::invalid_argument(std::string("this machine has no ") + isa_name(isa));
    if (w.out < 1 || w.in < 1)
        throw std::invalid_argument("trellis: a weight [" + std::to_string(w.out) + ", " + std::to_string(w.in) + "]");
    trellis_check(w.code);
}

} // namespace

void trellis_check(const TrellisCode& code) {
    if (code.m < trellis_least_bits || code.m > trellis_most_bits)
        throw std::invalid_argument("trellis: " + std::to_string(code.m) + " bits for 16 weights, not 16 to 80");
    if (code.window != 12 && code.window != 14 && code.window != 16)
        throw std::invalid_argument("trellis: a window of " + std::to_string(code.window) + " bits, not 12, 14 or 16");
}

void trellis_decode(Isa isa, const TrellisWeight& w, const int64_t* index, int64_t n, float* y, int threads) {
    check(isa, w);
    if (index == nullptr && n != w.out)
        throw std::invalid_argument("trellis: " + std::to_string(n) + " rows of " + std::to_string(w.out));
    for (int64_t i = 0; index != nullptr && i < n; ++i)
        if (index[i] < 0 || index[i] >= w.out)
            throw std::invalid_argument("trellis: row " + std::to_string(index[i]) + " of " + std::to_string(w.out));
    struct Call {
        const TrellisDecodeUnit& unit;
        const TrellisWeight& w;
        const int64_t* index;
        float* y;
    } call{unit_of(isa), w, index, y};
    const auto body = [](void* context, int64_t begin, int64_t end) {
        const Call& c = *static_cast<const Call*>(context);
        c.unit.rows(c.w, c.index, begin, end, c.y);
    };
    parallel_for(n, useful_threads(n * w.in, threads), body, &call);
}

void trellis_linear(Isa isa, const TrellisWeight& w, const float* x, int64_t tokens, float* y, int threads) {
    check(isa, w);
    struct Call {
        const TrellisDecodeUnit& unit;
        const TrellisWeight& w;
        const float* x;
        int64_t tokens;
        float* y;
    } call{unit_of(isa), w, x, tokens, y};
    const auto body = [](void* context, int64_t begin, int64_t end) {
        const Call& c = *static_cast<const Call*>(context);
        thread_local std::vector<float> row; // kept between calls
        row.resize(static_cast<size_t>(c.w.in));
        c.unit.linear(c.w, c.x, c.tokens, c.y, begin, end, row.data());
    };
    parallel_for(w.out, useful_threads(w.out * w.in * (tokens < 1 ? 1 : tokens), threads), body, &call);
}

} // namespace bitpalette
