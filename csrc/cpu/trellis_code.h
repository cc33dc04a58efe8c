// The code of codec `trellis`: what a bit string means. The format in whole is in quant/trellis.py.
//
// A tile is 16 x 16 weights, rows are outputs; weight i = 16 * row + column. Its 16 m bits (m = 16 * rate) are one
// cyclic little-endian string, bit j being bit j % 8 of byte j // 8, and weight i reads the 16 bits from floor(i m /
// 16) on. m = 40:
//
//     bit   0    2    5    7    10        16   18   21        40 = row 1               640 = 0
//           [......... weight 0 .........)                    |                         |
//                [......... weight 1 .........)               [......... weight 16 ........)
//                     [......... weight 2 .........)                     ... weight 255 wraps round to bit 0
//
// state = the window's low L bits, level = the sum of the bytes of state * 0x83DCD12D (mod 2^32) - 510, weight = level
// * scale / 128.
#pragma once

#include <cstdint>

namespace bitpalette {

constexpr int trellis_side = 16;     // of a tile
constexpr int trellis_weights = 256; // of a tile
constexpr int trellis_least_bits = 16, trellis_most_bits = 80;

constexpr int trellis_level(uint32_t state) {
    const uint32_t product = state * 0x83DCD12Du;
    return static_cast<int>((product & 0xff) + (product >> 8 & 0xff) + (product >> 16 & 0xff) + (product >> 24)) - 510;
}

// m bits for every 16 weights, windows of L bits.
struct TrellisCode {
    int m;
    int window; // 12, 14 or 16

    constexpr int bytes() const { return 2 * m; } // of a tile
    // Weight i's first bit; i may be 256, which is where weight 0 begins again.
    constexpr int offset(int i) const { return i * m / 16; }
    // k_i: how many bits weight i has and weight i + 1 has not. These are its window's low bits.
    constexpr int step(int i) const { return offset(i + 1) - offset(i); }

    uint32_t state(const uint8_t* tile, int i) const {
        const int bit = offset(i), byte = bit / 8, n = bytes();
        const auto at = [&](int b) { return static_cast<uint32_t>(tile[b < n ? b : b - n]); };
        const uint32_t word = at(byte) | at(byte + 1) << 8 | at(byte + 2) << 16;
        return word >> (bit % 8) & ((1u << window) - 1);
    }
};

// The weight that is coded in step 0, 1, ... of a pass that begins `lead` steps before the seam (trellis_search.h).
constexpr int trellis_weight_of_step(int lead, int step) {
    return (lead - 1 - step) & (trellis_weights - 1);
}

// std::invalid_argument for a rate or window that does not exist.
void trellis_check(const TrellisCode& code);

} // namespace bitpalette
