// Codec `trellis`: values are levels, -510 to 510, whole numbers. The row's scale / 128 is the GEMM's.
#pragma once

#include "fragment_lut.cuh"

namespace bitpalette {

// Where a lane finds its windows in a tile: 32 bits from the first of its four columns on hold all four.
struct TrellisLane {
    int word_g, word_g8; // of the tile: in which the 32 bits of rows g and g + 8 begin; row g's end in the one after
    int next_g8;         // the one in which those of row g + 8 end: the tile is a circle
    uint32_t shift_g, shift_g8;
    uint32_t step1, step2, step3; // from the window of the first column to those of the others
    uint32_t mask;                // of L bits
    int tile_words;

    BP_DEVICE static TrellisLane make(int row_bits, int window, int lane) {
        const int g = lane / 4, first = lane % 4 * 4;
        const int words = (row_bits + 1) / 2, begin = first * row_bits / 16;
        const int bit_g = g * row_bits + begin, bit_g8 = (g + 8) * row_bits + begin;
        TrellisLane at;
        at.word_g = bit_g / 32;
        at.word_g8 = bit_g8 / 32;
        at.next_g8 = at.word_g8 + 1 == words ? 0 : at.word_g8 + 1;
        at.shift_g = bit_g % 32;
        at.shift_g8 = bit_g8 % 32;
        at.step1 = (first + 1) * row_bits / 16 - begin;
        at.step2 = (first + 2) * row_bits / 16 - begin;
        at.step3 = (first + 3) * row_bits / 16 - begin;
        at.mask = (1u << window) - 1;
        at.tile_words = words;
        return at;
    }
};

// TileWords: words of a tile, or 0 where they are known at run time only. Then a tile's three addresses are a sum each,
// 0.4 instructions a weight.
template <class A, int TileWords = 0>
struct TrellisFragment {
    using Act = A;
    using Table = TrellisLane;
    using Zero = NoZero;
    struct Words {
        const uint32_t *g, *g8, *next_g8; // in the first tile
    };
    static constexpr bool grouped = false;
    static constexpr float factor = trellis_unit;
    static constexpr int table_bytes = 0;
    static constexpr int tiles = tiles_along * tiles_along;
    static constexpr int least_bytes = 4 * tiles * (TileWords ? TileWords : 8); // 1 bit
    static constexpr int most_bytes = 4 * tiles * (TileWords ? TileWords : 40); // 5 bits

    BP_HOST_DEVICE static int superblock_bytes(const FragmentArgs& args) {
        return TileWords ? most_bytes : 4 * superblock_words(Format::trellis, args.row_bits);
    }
    BP_DEVICE static void fill(const FragmentArgs&, uint8_t*, int) {}
    BP_DEVICE static Table table(const FragmentArgs& args, const uint8_t*) {
        return TrellisLane::make(args.row_bits, args.window, ptx::lane());
    }
    BP_DEVICE static Zero zero(uint32_t, uint32_t) { return {}; }
    BP_DEVICE static Words load(const Table& at, const uint8_t* superblock, int n16, int) {
        const uint32_t* tile = reinterpret_cast<const uint32_t*>(superblock) + n16 * tiles_along * tile_words(at);
        return {tile + at.word_g, tile + at.word_g8, tile + at.next_g8};
    }
    BP_DEVICE static void fragment(const Table& at, const Zero&, const Words& words, int k16, uint32_t (&a)[4]) {
        const int tile = k16 * tile_words(at);
        const uint32_t g = ptx::funnel_right(words.g[tile], words.g[tile + 1], at.shift_g);
        const uint32_t g8 = ptx::funnel_right(words.g8[tile], words.next_g8[tile], at.shift_g8);
        a[0] = pair(g & at.mask, g >> at.step1 & at.mask, Act{});
        a[1] = pair(g8 & at.mask, g8 >> at.step1 & at.mask, Act{});
        a[2] = pair(g >> at.step2 & at.mask, g >> at.step3 & at.mask, Act{});
        a[3] = pair(g8 >> at.step2 & at.mask, g8 >> at.step3 & at.mask, Act{});
    }

  private:
    BP_DEVICE static int tile_words(const Table& at) { return TileWords ? TileWords : at.tile_words; }

    // The byte sum, at most 1020, under the exponent of 1024 is fp16's 1024 + sum.
    BP_DEVICE static uint32_t pair(uint32_t first, uint32_t second, Half) {
        const uint32_t low = ptx::dp4a_uu(first * trellis_multiplier, 0x01010101u, 0x6400u);
        const uint32_t high = ptx::dp4a_uu(second * trellis_multiplier, 0x01010101u, 0x6400u);
        return Half::sub(ptx::prmt(low, high, 0x5410u), splat16(0x6400u + uint32_t(trellis_centre)));
    }
    // bf16 rounds levels beyond 256, by 2^-9 of themselves at most.
    BP_DEVICE static uint32_t pair(uint32_t first, uint32_t second, BFloat) {
        constexpr uint32_t two_to_23 = 0x4b000000u;
        const float zero = ptx::uint_as_float(two_to_23 + uint32_t(trellis_centre));
        const uint32_t low = ptx::dp4a_uu(first * trellis_multiplier, 0x01010101u, two_to_23);
        const uint32_t high = ptx::dp4a_uu(second * trellis_multiplier, 0x01010101u, two_to_23);
        return BFloat::pack(ptx::uint_as_float(low) - zero, ptx::uint_as_float(high) - zero);
    }
};

} // namespace bitpalette
