// The 16-bit activation types of the GEMMs: fp16 and bf16, two in a 32-bit word.
#pragma once

#include "ptx.cuh"

namespace bitpalette {

struct Half {
    // 1024 in both halves: an integer below 1024 in the low bits of a half makes 1024 + integer, exactly.
    static constexpr uint32_t magic = 0x64006400u;

    BP_DEVICE static void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { ptx::mma_f16(c, a, b); }
    BP_DEVICE static uint32_t add(uint32_t a, uint32_t b) { return ptx::add_f16x2(a, b); }
    BP_DEVICE static uint32_t sub(uint32_t a, uint32_t b) { return ptx::sub_f16x2(a, b); }
    BP_DEVICE static uint32_t mul(uint32_t a, uint32_t b) { return ptx::mul_f16x2(a, b); }
    BP_DEVICE static uint32_t pack(float low, float high) { return ptx::pack_f16x2(low, high); }
    BP_DEVICE static float2 unpack(uint32_t pair) { return ptx::unpack_f16x2(pair); }
};

struct BFloat {
    // 128 in both halves: integers below 128.
    static constexpr uint32_t magic = 0x43004300u;

    BP_DEVICE static void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { ptx::mma_bf16(c, a, b); }
    BP_DEVICE static uint32_t add(uint32_t a, uint32_t b) { return ptx::add_bf16x2(a, b); }
    BP_DEVICE static uint32_t sub(uint32_t a, uint32_t b) { return ptx::sub_bf16x2(a, b); }
    BP_DEVICE static uint32_t mul(uint32_t a, uint32_t b) { return ptx::mul_bf16x2(a, b); }
    BP_DEVICE static uint32_t pack(float low, float high) { return ptx::pack_bf16x2(low, high); }
    BP_DEVICE static float2 unpack(uint32_t pair) { return ptx::unpack_bf16x2(pair); }
};

// Both halves of a word.
BP_DEVICE uint32_t splat16(uint32_t half) {
    return half * 0x00010001u;
}

// (a & Mask) | (b & ~Mask), one instruction.
template <uint32_t Mask>
BP_DEVICE uint32_t blend(uint32_t a, uint32_t b) {
    return ptx::lop3<0xe4>(a, b, Mask);
}

// (a & Mask) | b, one instruction.
template <uint32_t Mask>
BP_DEVICE uint32_t mask_or(uint32_t a, uint32_t b) {
    return ptx::lop3<0xf8>(b, a, Mask);
}

} // namespace bitpalette
