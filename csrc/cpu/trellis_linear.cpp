#include "trellis_linear.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "parallel.h"
#include "trellis_linear_unit.h"

namespace bitpalette {
namespace {

// Below this many weights a thread, waking another thread (about 2 us) costs more than it saves.
constexpr int64_t weights_per_thread = 64 << 10;

const TrellisLinearUnit& unit_of(Isa isa) {
#if BITPALETTE_X86
    if (isa == Isa::avx512)
        return trellis_linear_avx512;
    if (isa == Isa::avx2)
        return trellis_linear_avx2;
#endif
    return trellis_linear_scalar;
}

TrellisTileWindows windows_of(const TrellisCode& code) {
    TrellisTileWindows windows{};
    for (int r = 0; r < trellis_side; ++r) {
        TrellisRowWindows& row = windows.row[r];
        // a piece is read inside its tile: after the last tile there may be no memory
        const int latest = code.bytes() - (r == trellis_side - 1 ? trellis_piece - 2 : trellis_piece);
        row.begin = r == trellis_side - 1 ? latest : std::min(code.offset(trellis_side * r) / 8, latest);
        for (int c = 0; c < trellis_side; ++c) {
            const int bit = code.offset(trellis_side * r + c);
            row.shift[c] = static_cast<uint32_t>(bit % 8);
            for (int b = 0; b < 4; ++b) {
                const int byte = bit / 8 + b - static_cast<int>(row.begin);
                // 7 + 16 bits are three bytes; what lies beyond the piece is beyond the window as well
                row.pick[c][b] = static_cast<uint8_t>(b < 3 && byte < trellis_piece ? byte : 0x80);
            }
        }
    }
    return windows;
}

// Made once: 65 rates of 2 KiB, 0.1 ms, against 2 us a call.
const TrellisTileWindows& windows_for(const TrellisCode& code) {
    constexpr int rates = trellis_most_bits - trellis_least_bits + 1;
    static const std::vector<TrellisTileWindows> all = [] {
        std::vector<TrellisTileWindows> made;
        for (int k = 0; k < rates; ++k)
            made.push_back(windows_of({trellis_least_bits + k, 16}));
        return made;
    }();
    return all[static_cast<size_t>(code.m - trellis_least_bits)];
}

// Aligned to a cache line; kept between calls.
float* room_for_x(int64_t floats) {
    constexpr size_t line = 64;
    thread_local std::vector<float> room;
    room.resize(static_cast<size_t>(floats) + line / sizeof(float));
    void* at = room.data();
    size_t bytes = room.size() * sizeof(float);
    return static_cast<float*>(std::align(line, static_cast<size_t>(floats) * sizeof(float), at, bytes));
}

} // namespace

TrellisDecoder trellis_decoder(Isa isa, const TrellisWeight& w) {
    if (!isa_available(isa))
        throw std::invalid_argument(std::string("this machine has no ") + isa_name(isa));
    if (w.out < 1 || w.in < 1)
        throw std::invalid_argument("trellis: a weight [" + std::to_string(w.out) + ", " + std::to_string(w.in) + "]");
    trellis_check(w.code);
    return {unit_of(isa), windows_for(w.code)};
}

int trellis_threads(int64_t weights, int threads) {
    return static_cast<int>(std::clamp<int64_t>(weights / weights_per_thread, 1, std::max(threads, 1)));
}

uint8_t* trellis_pieces_room(const TrellisWeight& w) {
    thread_local std::vector<uint8_t> room;
    room.resize(static_cast<size_t>(w.tiles() * trellis_piece));
    return room.data();
}

void trellis_linear(Isa isa, const TrellisWeight& w, const float* x, int64_t tokens, float* y, int threads) {
    const TrellisDecoder decoder = trellis_decoder(isa, w);
    // x as it is read: from the start of a cache line, zeros where columns fill up the last tile, and an odd number of
    // lines from token to token, since tokens a multiple of 4 KiB apart would compete for one set of the cache
    const int64_t x_row = (w.tiles() | 1) * trellis_side;
    float* packed = room_for_x(tokens * x_row);
    for (int64_t t = 0; t < tokens; ++t)
        std::fill(std::copy_n(x + t * w.in, w.in, packed + t * x_row), packed + (t + 1) * x_row, 0.0f);
    struct Call {
        const TrellisDecoder& decoder;
        const TrellisWeight& w;
        const float* x;
        int64_t x_row, tokens;
        float* y;
    } call{decoder, w, packed, x_row, tokens, y};
    const auto body = [](void* context, int64_t begin, int64_t end) {
        const Call& c = *static_cast<const Call*>(context);
        c.decoder.unit.linear(c.w, c.decoder.windows, c.x, c.x_row, c.tokens, c.y, begin, end,
                              trellis_pieces_room(c.w));
    };
    const int64_t tile_rows = (w.out + trellis_side - 1) / trellis_side;
    parallel_for(tile_rows, trellis_threads(w.out * w.in * std::max<int64_t>(tokens, 1), threads), body, &call);
}

} // namespace bitpalette
