// Quads of codes out of the planes of a tile (codes.h), written once over a vocabulary V with 64 bytes in V::Codes.
// Everything is in an unnamed namespace, since units with different instruction sets include it.
#pragma once

#include "codes_unit.h"

#define BITPALETTE_INLINE inline __attribute__((always_inline))

namespace bitpalette {
namespace {

// to_bit: where the lowest bit of the code goes, 0, or 1 for twice the code.
template <class V, int bits, int to_bit = 0>
struct Planes {
    static constexpr int bytes = codes_plane_bytes * bits;

    // Codes of columns 4k..4k+3 of the tile, a byte each.
    template <int k>
    static BITPALETTE_INLINE typename V::Codes quad(const uint8_t* tile) {
        if constexpr (bits == 8) {
            return V::load_codes(tile + codes_plane_bytes * k);
        } else {
            constexpr int pairs = bits & 4 ? 4 : 0;             // registers before the 2-bit plane
            constexpr int singles = pairs + (bits & 2 ? 2 : 0); // and before the 1-bit plane
            constexpr int pair_bit = pairs + to_bit;            // lowest bit of each plane in the code
            constexpr int single_bit = bits - 1 + to_bit;
            if constexpr (bits & 4) {
                const auto low = part<4 * (k % 2), to_bit, 15>(tile, k / 2);
                if constexpr ((bits & 3) == 0)
                    return low;
                else if constexpr ((bits & 3) == 2)
                    return add<2 * (k % 4), pair_bit, 3>(low, tile, pairs + k / 4);
                else if constexpr ((bits & 3) == 1)
                    return add<k, single_bit, 1>(low, tile, singles);
                else
                    return add<k, single_bit, 1>(add<2 * (k % 4), pair_bit, 3>(low, tile, pairs + k / 4), tile,
                                                 singles);
            } else if constexpr (bits & 2) {
                const auto low = part<2 * (k % 4), pair_bit, 3>(tile, pairs + k / 4);
                if constexpr (bits & 1)
                    return add<k, single_bit, 1>(low, tile, singles);
                else
                    return low;
            } else {
                return part<k, single_bit, 1>(tile, singles);
            }
        }
    }

  private:
    // The bits of `mask` from bit `from` of the bytes of a register, moved to bit `to`. Where shifts are of wider
    // words, what they bring in from a neighbouring byte is masked out.
    template <int from, int to, int mask>
    static BITPALETTE_INLINE typename V::Codes part(const uint8_t* tile, int index) {
        const typename V::Codes moved = V::template shift<from - to>(V::load_codes(tile + codes_plane_bytes * index));
        constexpr int brought = from >= to ? 255 >> (from >= to ? from - to : 0) : 255; // bits that a shift leaves
        if constexpr (V::shifts_bytes && brought == mask << to)
            return moved;
        else
            return V::masked(moved, mask << to);
    }
    template <int from, int to, int mask>
    static BITPALETTE_INLINE typename V::Codes add(typename V::Codes code, const uint8_t* tile, int index) {
        return V::merged(code, V::template shift<from - to>(V::load_codes(tile + codes_plane_bytes * index)),
                         mask << to);
    }
};

} // namespace
} // namespace bitpalette
