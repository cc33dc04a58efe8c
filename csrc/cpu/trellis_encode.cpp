#include "trellis_encode.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "parallel.h"
#include "trellis_search.h"

namespace bitpalette {
namespace {

constexpr int block = 64; // tiles among which those that need a second pass are put in pairs

const TrellisStepUnit& unit_of(Isa isa) {
#if BITPALETTE_X86
    if (isa == Isa::avx512vbmi)
        return trellis_step_avx512vbmi;
    if (isa == Isa::avx512)
        return trellis_step_avx512;
    if (plain_isa(isa) == Isa::avx2)
        return trellis_step_avx2;
#endif
#if BITPALETTE_AARCH64
    if (isa == Isa::neon)
        return trellis_step_neon;
#endif
    return trellis_step_scalar;
}

// A step's new bits are its state's lowest: weight i has bits offset(i) .. offset(i + 1) - 1 of the tile for itself.
void pack(const TrellisCode& code, const uint16_t* states, uint8_t* tile) {
    uint32_t pending = 0;
    int bits = 0;
    for (int i = 0; i < trellis_weights; ++i) {
        const int step = code.step(i);
        pending |= (states[i] & ((1u << step) - 1)) << bits;
        for (bits += step; bits >= 8; bits -= 8, pending >>= 8)
            *tile++ = static_cast<uint8_t>(pending);
    }
}

// Whether the tile's bits say what the search meant. They do unless states that follow each other do not join.
bool reads_back(const TrellisCode& code, const uint8_t* tile, const uint16_t* states) {
    uint8_t string[2 * trellis_most_bits + 4]; // its beginning once more at its end
    std::memcpy(string, tile, static_cast<size_t>(code.bytes()));
    std::memcpy(string + code.bytes(), tile, 4);
    uint32_t different = 0;
    for (int i = 0, sixteenths = 0; i < trellis_weights; ++i, sixteenths += code.m) {
        const int bit = sixteenths / 16;
        uint32_t word = 0;
        for (int b = 0; b < 3; ++b) // joined to one load
            word |= static_cast<uint32_t>(string[bit / 8 + b]) << (8 * b);
        different |= (word >> (bit % 8) ^ states[i]) & ((1u << code.window) - 1);
    }
    return different == 0;
}

} // namespace

int64_t trellis_encode(Isa isa, const float* x, int64_t tiles, const TrellisCode& code, uint8_t* codes, float* levels,
                       int threads) {
    if (!isa_available(isa))
        throw std::invalid_argument(std::string("this machine has no ") + isa_name(isa));
    if (tiles < 0)
        throw std::invalid_argument("trellis: " + std::to_string(tiles) + " tiles");
    trellis_check(code);
    struct Call {
        const TrellisStepUnit& unit;
        const float* x;
        const TrellisCode& code;
        uint8_t* codes;
        float* levels;
        std::atomic<int64_t> exact{0}, broken{0};
    } call{unit_of(isa), x, code, codes, levels};
    const auto body = [](void* context, int64_t begin, int64_t end) {
        Call& c = *static_cast<Call*>(context);
        // tens of MiB, kept between calls: error feedback makes thousands of calls with one code
        thread_local std::unique_ptr<TrellisSearch> search;
        if (!search || !search->is_for(c.unit, c.code))
            search = std::make_unique<TrellisSearch>(c.unit, c.code);
        uint16_t found[block * trellis_weights];
        for (int64_t first = begin; first < end; first += block) {
            const int count = static_cast<int>(std::min<int64_t>(end - first, block));
            c.exact += search->find(c.x + first * trellis_weights, count, found);
            for (int k = 0; k < count; ++k) {
                const uint16_t* states = found + k * trellis_weights;
                uint8_t* tile = c.codes + (first + k) * c.code.bytes();
                pack(c.code, states, tile);
                c.broken += !reads_back(c.code, tile, states);
                for (int i = 0; c.levels != nullptr && i < trellis_weights; ++i)
                    c.levels[(first + k) * trellis_weights + i] = static_cast<float>(trellis_level(states[i]));
            }
        }
    };
    parallel_for(tiles, threads, body, &call);
    if (call.broken > 0)
        throw std::logic_error("trellis: " + std::to_string(call.broken) +
                               " tiles whose states do not join; please report");
    return call.exact;
}

} // namespace bitpalette
