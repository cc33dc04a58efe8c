// Codecs `lut` and `float` (e2m1): values from a table of at most 16 levels.
#pragma once

#include "fragment.cuh"

namespace bitpalette {

// Level `entry` of the table in the activations' type, in the low half. bf16 rounds it, by 2^-9 of itself at most.
template <class Act>
BP_DEVICE uint32_t level16(const void* table, int entry) {
    const uint32_t bits = static_cast<const uint16_t*>(table)[entry];
    const float value = ptx::unpack_f16x2(bits).x;
    return Act::pack(value, 0.0f) & 0xffffu;
}

struct NoZero {};

// Two or three bits: the levels' low bytes in two registers and their high bytes in two more. Four codes, a nibble
// each, select four bytes of either at once. Slots are in pair order: 0 and 1 make a0, 2 and 3 a1, and so on.
template <class A, int Bits>
struct LutFragment {
    using Act = A;
    struct Table {
        uint32_t low[2], high[2];
    };
    using Zero = NoZero;
    using Words = NibbleWords<Bits>;
    static constexpr bool grouped = true;
    static constexpr float factor = 1.0f;
    static constexpr int table_bytes = 0;
    static constexpr int least_bytes = Bits * block_side * block_side / 8, most_bytes = least_bytes;

    BP_HOST_DEVICE static int superblock_bytes(const FragmentArgs&) { return most_bytes; }
    BP_DEVICE static void fill(const FragmentArgs&, uint8_t*, int) {}
    BP_DEVICE static Table table(const FragmentArgs& args, const uint8_t*) {
        Table table = {};
        BP_UNROLL
        for (int e = 0; e < 8; ++e) {
            const uint32_t level = level16<Act>(args.table, e);
            table.low[e / 4] |= (level & 0xffu) << 8 * (e % 4);
            table.high[e / 4] |= (level >> 8) << 8 * (e % 4);
        }
        return table;
    }
    BP_DEVICE static Zero zero(uint32_t, uint32_t) { return {}; }
    BP_DEVICE static Words load(const Table&, const uint8_t* superblock, int n16, int lane) {
        return Words::load(superblock, n16, lane);
    }
    BP_DEVICE static void fragment(const Table& table, const Zero&, const Words& words, int k16, uint32_t (&a)[4]) {
        constexpr uint32_t mask = Bits == 2 ? 0x33333333u : 0x77777777u; // a selector's top bit would spread the sign
        const uint32_t codes = words.tile(k16) & mask;
        pairs(table, codes, a[0], a[1]);
        pairs(table, codes >> 16, a[2], a[3]);
    }

  private:
    BP_DEVICE static void pairs(const Table& table, uint32_t selector, uint32_t& first, uint32_t& second) {
        const uint32_t low = ptx::prmt(table.low[0], table.low[1], selector);
        const uint32_t high = ptx::prmt(table.high[0], table.high[1], selector);
        first = ptx::prmt(low, high, 0x5140u);
        second = ptx::prmt(low, high, 0x7362u);
    }
};

// Four bits: a byte of the codes is a pair of levels, one word of a table of 256 in shared memory. There the table lies
// 32 times, so that every lane reads a bank of its own.
template <class A>
struct PairFragment {
    using Act = A;
    struct Table {
        const uint32_t* pair; // of this lane
    };
    using Zero = NoZero;
    using Words = NibbleWords<4>;
    static constexpr bool grouped = true;
    static constexpr float factor = 1.0f;
    static constexpr int table_bytes = 256 * 32 * 4;
    static constexpr int least_bytes = block_side * block_side / 2, most_bytes = least_bytes;

    BP_HOST_DEVICE static int superblock_bytes(const FragmentArgs&) { return most_bytes; }
    // By all threads of a block; a barrier must follow.
    BP_DEVICE static void fill(const FragmentArgs& args, uint8_t* shared, int warps) {
        uint32_t* pairs = reinterpret_cast<uint32_t*>(shared);
        for (unsigned code = ptx::warp(); code < 256; code += warps) {
            const uint32_t low = level16<Act>(args.table, code & 15), high = level16<Act>(args.table, code >> 4);
            pairs[code * 32 + ptx::lane()] = low | high << 16;
        }
    }
    BP_DEVICE static Table table(const FragmentArgs&, const uint8_t* shared) {
        return {reinterpret_cast<const uint32_t*>(shared) + ptx::lane()};
    }
    BP_DEVICE static Zero zero(uint32_t, uint32_t) { return {}; }
    BP_DEVICE static Words load(const Table&, const uint8_t* superblock, int n16, int lane) {
        return Words::load(superblock, n16, lane);
    }
    BP_DEVICE static void fragment(const Table& table, const Zero&, const Words& words, int k16, uint32_t (&a)[4]) {
        const uint32_t word = words.word[k16];
        BP_UNROLL
        for (int r = 0; r < 4; ++r)
            a[r] = table.pair[(word >> 8 * r & 0xffu) * 32];
    }
};

} // namespace bitpalette
