// Codec `int`: value = code - zero point, exact in 16 bits. The scale is the GEMM's.
#pragma once

#include "fragment.cuh"

namespace bitpalette {

// fp16: a code in the low bits of a half under the exponent of 1024 is 1024 + code, four bits higher 1024 + 16 code,
// which one multiply-add brings to code - zero. Both steps are exact: all values are multiples of one unit below 2^11.
template <class Act>
struct NibbleValues {
    uint32_t row0, row8; // of rows g and g + 8: 1024 + zero, and -(64 + zero)

    BP_DEVICE static NibbleValues zero(uint32_t z0, uint32_t z8) {
        return {splat16(0x6400u + z0), splat16(0xd400u + (z8 << 4))};
    }
    template <int Bits>
    BP_DEVICE void fragment(uint32_t word, uint32_t (&a)[4]) const {
        constexpr uint32_t low = ((1u << Bits) - 1) * 0x00010001u, high = low << 4;
        constexpr uint32_t sixteenth = 0x2c002c00u;
        const uint32_t next = word >> 8;
        a[0] = Half::sub(mask_or<low>(word, Half::magic), row0);
        a[1] = ptx::fma_f16x2(mask_or<high>(word, Half::magic), sixteenth, row8);
        a[2] = Half::sub(mask_or<low>(next, Half::magic), row0);
        a[3] = ptx::fma_f16x2(mask_or<high>(next, Half::magic), sixteenth, row8);
    }
};

// bf16 has room for codes below 128 only: every pair is shifted down.
template <>
struct NibbleValues<BFloat> {
    uint32_t row0, row8; // 128 + zero

    BP_DEVICE static NibbleValues zero(uint32_t z0, uint32_t z8) {
        return {splat16(0x4300u + z0), splat16(0x4300u + z8)};
    }
    template <int Bits>
    BP_DEVICE void fragment(uint32_t word, uint32_t (&a)[4]) const {
        constexpr uint32_t low = ((1u << Bits) - 1) * 0x00010001u;
        a[0] = BFloat::sub(mask_or<low>(word, BFloat::magic), row0);
        a[1] = BFloat::sub(mask_or<low>(word >> 4, BFloat::magic), row8);
        a[2] = BFloat::sub(mask_or<low>(word >> 8, BFloat::magic), row0);
        a[3] = BFloat::sub(mask_or<low>(word >> 12, BFloat::magic), row8);
    }
};

struct NoTable {};

template <class A, int Bits>
struct IntFragment {
    using Act = A;
    using Table = NoTable;
    using Zero = NibbleValues<Act>;
    using Words = NibbleWords<Bits>;
    static constexpr bool grouped = true;
    static constexpr float factor = 1.0f;
    static constexpr int table_bytes = 0; // of shared memory

    static constexpr int least_bytes = Bits * block_side * block_side / 8, most_bytes = least_bytes;

    BP_HOST_DEVICE static int superblock_bytes(const FragmentArgs&) { return most_bytes; }
    BP_DEVICE static void fill(const FragmentArgs&, uint8_t*, int) {}
    BP_DEVICE static Table table(const FragmentArgs&, const uint8_t*) { return {}; }
    BP_DEVICE static Zero zero(uint32_t z0, uint32_t z8) { return Zero::zero(z0, z8); }
    BP_DEVICE static Words load(const Table&, const uint8_t* superblock, int n16, int lane) {
        return Words::load(superblock, n16, lane);
    }
    BP_DEVICE static void fragment(const Table&, const Zero& zero, const Words& words, int k16, uint32_t (&a)[4]) {
        zero.template fragment<Bits>(words.tile(k16), a);
    }
};

// Eight bits, fp16: bytes under the exponent of 1024.
template <class Act>
struct ByteValues {
    uint32_t row0, row8;

    BP_DEVICE static ByteValues zero(uint32_t z0, uint32_t z8) {
        return {splat16(0x6400u + z0), splat16(0x6400u + z8)};
    }
    BP_DEVICE static uint32_t pair(uint32_t word, uint32_t selector, uint32_t zero) {
        return Half::sub(ptx::prmt(word, Half::magic, selector), zero);
    }
};

// bf16 cannot hold 128 + code: by way of fp32, where 2^23 + code is exact; the difference has 8 bits and fits bf16.
template <>
struct ByteValues<BFloat> {
    float row0, row8;

    BP_DEVICE static ByteValues zero(uint32_t z0, uint32_t z8) {
        return {ptx::uint_as_float(0x4b000000u + z0), ptx::uint_as_float(0x4b000000u + z8)};
    }
    BP_DEVICE static uint32_t pair(uint32_t word, uint32_t selector, float zero) {
        const float low = ptx::uint_as_float(ptx::prmt(word, 0x4b000000u, 0x7440u | (selector & 0x3u)));
        const float high = ptx::uint_as_float(ptx::prmt(word, 0x4b000000u, 0x7440u | (selector >> 8 & 0x3u)));
        return BFloat::pack(low - zero, high - zero);
    }
};

template <class A>
struct IntFragment<A, 8> {
    using Act = A;
    using Table = NoTable;
    using Zero = ByteValues<Act>;
    using Words = ByteWords;
    static constexpr bool grouped = true;
    static constexpr float factor = 1.0f;
    static constexpr int table_bytes = 0;
    static constexpr int least_bytes = block_side * block_side, most_bytes = least_bytes;

    BP_HOST_DEVICE static int superblock_bytes(const FragmentArgs&) { return most_bytes; }
    BP_DEVICE static void fill(const FragmentArgs&, uint8_t*, int) {}
    BP_DEVICE static Table table(const FragmentArgs&, const uint8_t*) { return {}; }
    BP_DEVICE static Zero zero(uint32_t z0, uint32_t z8) { return Zero::zero(z0, z8); }
    BP_DEVICE static Words load(const Table&, const uint8_t* superblock, int n16, int lane) {
        return Words::load(superblock, n16, lane);
    }
    // bytes in the column order 0, 2, 1, 3: the first pair is bytes 0 and 2
    BP_DEVICE static void fragment(const Table&, const Zero& zero, const Words& words, int k16, uint32_t (&a)[4]) {
        const uint32_t g = words.word[2 * k16], g8 = words.word[2 * k16 + 1];
        a[0] = Zero::pair(g, 0x5250u, zero.row0);
        a[1] = Zero::pair(g8, 0x5250u, zero.row8);
        a[2] = Zero::pair(g, 0x5351u, zero.row0);
        a[3] = Zero::pair(g8, 0x5351u, zero.row8);
    }
};

} // namespace bitpalette
