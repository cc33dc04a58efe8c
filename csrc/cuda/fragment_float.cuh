// Codec `float`, e4m3: sign, four bits of exponent, three of mantissa, in a byte.
#pragma once

#include "fragment_lut.cuh"

namespace bitpalette {

template <class A>
struct E4M3Fragment {
    using Act = A;
    struct Table {};
    using Zero = NoZero;
    using Words = ByteWords;
    static constexpr bool grouped = true;
    static constexpr float factor = 256.0f; // the exponents' biases: 15 of fp16, 7 of e4m3
    static constexpr int table_bytes = 0;
    static constexpr int least_bytes = block_side * block_side, most_bytes = least_bytes;

    BP_HOST_DEVICE static int superblock_bytes(const FragmentArgs&) { return most_bytes; }
    BP_DEVICE static void fill(const FragmentArgs&, uint8_t*, int) {}
    BP_DEVICE static Table table(const FragmentArgs&, const uint8_t*) { return {}; }
    BP_DEVICE static Zero zero(uint32_t, uint32_t) { return {}; }
    BP_DEVICE static Words load(const Table&, const uint8_t* superblock, int n16, int lane) {
        return Words::load(superblock, n16, lane);
    }
    BP_DEVICE static void fragment(const Table&, const Zero&, const Words& words, int k16, uint32_t (&a)[4]) {
        const uint32_t g = words.word[2 * k16], g8 = words.word[2 * k16 + 1];
        a[0] = pair(g, 0x2404u);
        a[1] = pair(g8, 0x2404u);
        a[2] = pair(g, 0x3414u);
        a[3] = pair(g8, 0x3414u);
    }

  private:
    // The byte's exponent and mantissa moved to fp16's, short of 2^8; its subnormals become subnormals of fp16.
    BP_DEVICE static uint32_t pair(uint32_t word, uint32_t selector) {
        const uint32_t bytes = ptx::prmt(word, 0u, selector); // in the high bytes of the halves
        const uint32_t half = mask_or<0x80008000u>(bytes, bytes >> 1 & 0x3f803f80u);
        return from_half(half, Act{});
    }
    BP_DEVICE static uint32_t from_half(uint32_t half, Half) { return half; }
    // every e4m3 is a bf16: nothing is rounded
    BP_DEVICE static uint32_t from_half(uint32_t half, BFloat) {
        const float2 value = ptx::unpack_f16x2(half);
        return BFloat::pack(value.x, value.y);
    }
};

} // namespace bitpalette
