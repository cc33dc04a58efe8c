#include "trellis_linear.h"

#include <algorithm>
#include <array>
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

int useful_threads(int64_t weights, int threads) {
    return static_cast<int>(std::clamp<int64_t>(weights / weights_per_thread, 1, std::max(threads, 1)));
}

void check(Isa isa, const TrellisWeight& w) {
    if (!isa_available(isa))
        throw std::invalid_argument(std::string("this machine has no ") + isa_name(isa));
    if (w.out < 1 || w.in < 1)
        throw std::invalid_argument("trellis: a weight [" + std::to_string(w.out) + ", " + std::to_string(w.in) + "]");
    trellis_check(w.code);
}

TrellisRows rows_of(const TrellisCode& code) {
    TrellisRows rows{};
    for (int r = 0; r < trellis_side; ++r) {
        TrellisRow& row = rows.row[r];
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
    return rows;
}

// Made once: 65 rates of 2 KiB, 0.1 ms, against 2 us a call.
const TrellisRows& rows_for(const TrellisCode& code) {
    constexpr int rates = trellis_most_bits - trellis_least_bits + 1;
    static const std::vector<TrellisRows> all = [] {
        std::vector<TrellisRows> made;
        for (int k = 0; k < rates; ++k)
            made.push_back(rows_of({trellis_least_bits + k, 16}));
        return made;
    }();
    return all[static_cast<size_t>(code.m - trellis_least_bits)];
}

// Kept between calls, one a thread.
uint8_t* room_for_pieces(const TrellisWeight& w) {
    thread_local std::vector<uint8_t> room;
    room.resize(static_cast<size_t>(w.tiles() * trellis_piece));
    return room.data();
}

} // namespace

void trellis_gemv(Isa isa, const TrellisWeight& w, const float* x, int64_t tokens, float* y, int threads) {
    check(isa, w);
    const int64_t padded = w.tiles() * trellis_side;
    if (padded != w.in) { // the columns that fill up the last tile have levels too: they meet zeros
        thread_local std::vector<float> room;
        room.resize(static_cast<size_t>(padded * tokens));
        for (int64_t t = 0; t < tokens; ++t)
            std::fill(std::copy_n(x + t * w.in, w.in, &room[static_cast<size_t>(t * padded)]),
                      room.data() + (t + 1) * padded, 0.0f);
        x = room.data();
    }
    struct Call {
        const TrellisLinearUnit& unit;
        const TrellisWeight& w;
        const TrellisRows& rows;
        const float* x;
        int64_t tokens;
        float* y;
    } call{unit_of(isa), w, rows_for(w.code), x, tokens, y};
    const auto body = [](void* context, int64_t begin, int64_t end) {
        const Call& c = *static_cast<const Call*>(context);
        c.unit.linear(c.w, c.rows, c.x, c.tokens, c.y, begin, end, room_for_pieces(c.w));
    };
    const int64_t tile_rows = (w.out + trellis_side - 1) / trellis_side;
    parallel_for(tile_rows, useful_threads(w.out * w.in * std::max<int64_t>(tokens, 1), threads), body, &call);
}

void trellis_decode_fast(Isa isa, const TrellisWeight& w, const int64_t* index, int64_t n, float* y, int threads) {
    check(isa, w);
    if (index == nullptr && n != w.out)
        throw std::invalid_argument("trellis: " + std::to_string(n) + " rows of " + std::to_string(w.out));
    for (int64_t i = 0; index != nullptr && i < n; ++i)
        if (index[i] < 0 || index[i] >= w.out)
            throw std::invalid_argument("trellis: row " + std::to_string(index[i]) + " of " + std::to_string(w.out));
    struct Call {
        const TrellisLinearUnit& unit;
        const TrellisWeight& w;
        const TrellisRows& rows;
        const int64_t* index;
        float* y;
    } call{unit_of(isa), w, rows_for(w.code), index, y};
    const auto body = [](void* context, int64_t begin, int64_t end) {
        const Call& c = *static_cast<const Call*>(context);
        c.unit.decode(c.w, c.rows, c.index, begin, end, c.y, room_for_pieces(c.w));
    };
    parallel_for(n, useful_threads(n * w.in, threads), body, &call);
}

} // namespace bitpalette
