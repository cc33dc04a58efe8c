// Codes of the KV cache (quant/kv_token.py) as pairs of fp16: half their level, c - (2^b - 1) / 2, exactly.
//
// What is decoded is a word of two halves of 16 bits with equally many codes each: one half holds codes of one vector
// and the other those of another, or later ones of the same. A code is masked where it lies, behind the exponent of
// 1024: the half is then 1024 + (c << s), and one multiply-add by 2^-s takes it to c minus the middle. That needs s of
// 1 or more (1024 + 2^b - 1 and a half would need 12 bits), hence the shift by two.
#pragma once

#include "act16.cuh"

namespace bitpalette {

// Both halves a number that fp16 has.
BP_HOST_DEVICE constexpr uint32_t f16_pair(double value) {
    const uint32_t sign = value < 0 ? 0x8000u : 0u;
    double x = value < 0 ? -value : value;
    uint32_t exponent = 15;
    for (; x >= 2; x /= 2)
        ++exponent;
    for (; x < 1; x *= 2)
        --exponent;
    const uint32_t half = sign | exponent << 10 | static_cast<uint32_t>((x - 1) * 1024);
    return half << 16 | half;
}

// Codes of a half word: fields 0, 1, .. from its low end. For 3 bits they are 2-bit codes, and the third bits come in
// the bytes 0 and 2 of `high`, that of field i at bit i.
template <int Bits>
struct KvLevels {
    static constexpr int plane = Bits == 3 ? 2 : Bits; // bits of a field
    static constexpr int fields = 16 / plane;

    BP_DEVICE static void decode(uint32_t x, uint32_t high, uint32_t (&level)[fields]) {
        if constexpr (Bits == 8) {
            level[0] = middle(ptx::prmt(x, Half::magic, 0x5250)); // bytes 0 and 2, each under 0x64
            level[1] = middle(ptx::prmt(x, Half::magic, 0x5351));
        } else {
            const uint32_t word[2] = {x << 2, x >> 6}; // the lower fields begin at bit 2, the upper ones too
            pairs<0>(word, high, high << 3, level);
        }
    }

  private:
    BP_DEVICE static uint32_t middle(uint32_t x) {
        constexpr uint32_t half_of_most = f16_pair(127.5);
        return ptx::sub_f16x2(ptx::sub_f16x2(x, Half::magic), half_of_most);
    }

    template <int I>
    BP_DEVICE static void pairs(const uint32_t (&word)[2], uint32_t high, uint32_t high3, uint32_t (&level)[fields]) {
        if constexpr (I < fields) {
            constexpr int per_word = fields / 2, shift = 2 + I % per_word * plane;
            constexpr uint32_t mask = ((1u << plane) - 1) << shift;
            const uint32_t low = mask_or<mask * 0x00010001u>(word[I / per_word], Half::magic);
            constexpr double scale = 1.0 / (1 << shift);
            constexpr uint32_t scale_pair = f16_pair(scale);
            if constexpr (Bits == 3) {
                // bit 3 to 9 where `high` is shifted by three, which would push the last one out of the mantissa
                constexpr int at = I < 7 ? I + 3 : 7;
                constexpr double unit = 4.0 / (1 << at);
                constexpr uint32_t unit_pair = f16_pair(unit), less = f16_pair(-1024 * unit - 1024 * scale - 3.5);
                const uint32_t third = mask_or<(1u << at) * 0x00010001u>(I < 7 ? high3 : high, Half::magic);
                level[I] = ptx::fma_f16x2(low, scale_pair, ptx::fma_f16x2(third, unit_pair, less));
            } else {
                constexpr uint32_t less = f16_pair(-1024 * scale - ((1 << Bits) - 1) / 2.0);
                level[I] = ptx::fma_f16x2(low, scale_pair, less);
            }
            pairs<I + 1>(word, high, high3, level);
        }
    }
};

} // namespace bitpalette
