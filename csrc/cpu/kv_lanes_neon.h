// What kv_products.h needs beyond float lanes, for NEON with the dot product. Included by units compiled for it only.
#pragma once

#include "float_lanes_neon.h"

namespace bitpalette {
namespace {

struct KvNeon : Neon {
    struct Ints {
        int32x4_t a, b;
    };
    static constexpr int tile_rows = 4, tile_columns = 2;
    // the dot product takes signed bytes on both sides: codes of 8 bits are kept less 128
    static constexpr bool signed_bytes = true;

    static Ints all_ints(int32_t i) { return {vdupq_n_s32(i), vdupq_n_s32(i)}; }
    static Ints load_ints(const uint32_t* from) {
        return {vreinterpretq_s32_u32(vld1q_u32(from)), vreinterpretq_s32_u32(vld1q_u32(from + 4))};
    }
    static Ints load_ints(const int32_t* from) { return {vld1q_s32(from), vld1q_s32(from + 4)}; }
    static void store_ints(uint32_t* to, Ints i) {
        vst1q_u32(to, vreinterpretq_u32_s32(i.a));
        vst1q_u32(to + 4, vreinterpretq_u32_s32(i.b));
    }
    static void store_ints(int32_t* to, Ints i) {
        vst1q_s32(to, i.a);
        vst1q_s32(to + 4, i.b);
    }
    template <int Shift>
    static Ints right(Ints i) {
        return {shifted<Shift>(i.a), shifted<Shift>(i.b)};
    }
    static Ints both(Ints i, uint32_t mask) {
        const int32x4_t m = vreinterpretq_s32_u32(vdupq_n_u32(mask));
        return {vandq_s32(i.a, m), vandq_s32(i.b, m)};
    }
    static Ints either(Ints a, Ints b) { return {vorrq_s32(a.a, b.a), vorrq_s32(a.b, b.b)}; }
    static Ints flip_signs(Ints i) {
        const int32x4_t m = vreinterpretq_s32_u8(vdupq_n_u8(128));
        return {veorq_s32(i.a, m), veorq_s32(i.b, m)};
    }
    template <bool Wide>
    static Ints dot(Ints sum, Ints codes, Ints x) {
        return {vdotq_s32(sum.a, vreinterpretq_s8_s32(codes.a), vreinterpretq_s8_s32(x.a)),
                vdotq_s32(sum.b, vreinterpretq_s8_s32(codes.b), vreinterpretq_s8_s32(x.b))};
    }
    static Ints combined(Ints high, Ints low) {
        return {vaddq_s32(vshlq_n_s32(high.a, 8), low.a), vaddq_s32(vshlq_n_s32(high.b, 8), low.b)};
    }
    static Floats to_floats(Ints i) { return {vcvtq_f32_s32(i.a), vcvtq_f32_s32(i.b)}; }
    static void store_bytes(int8_t* to, Floats whole) {
        const int16x8_t shorts = vcombine_s16(vmovn_s32(vcvtq_s32_f32(whole.a)), vmovn_s32(vcvtq_s32_f32(whole.b)));
        vst1_s8(to, vmovn_s16(shorts));
    }

    // words [4, 64] (columns 0..7) of 16 bytes of 8 rows
    static void transpose(const uint8_t* rows, int64_t stride, uint32_t* to) {
        for (int half = 0; half < 2; ++half, rows += 4 * stride, to += 4) {
            const uint32x4_t a = load_words(rows), b = load_words(rows + stride), c = load_words(rows + 2 * stride),
                             d = load_words(rows + 3 * stride);
            const uint64x2_t ab = vreinterpretq_u64_u32(vtrn1q_u32(a, b)), cd = vreinterpretq_u64_u32(vtrn1q_u32(c, d));
            const uint64x2_t ab_odd = vreinterpretq_u64_u32(vtrn2q_u32(a, b)),
                             cd_odd = vreinterpretq_u64_u32(vtrn2q_u32(c, d));
            vst1q_u32(to, vreinterpretq_u32_u64(vtrn1q_u64(ab, cd)));
            vst1q_u32(to + 64, vreinterpretq_u32_u64(vtrn1q_u64(ab_odd, cd_odd)));
            vst1q_u32(to + 128, vreinterpretq_u32_u64(vtrn2q_u64(ab, cd)));
            vst1q_u32(to + 192, vreinterpretq_u32_u64(vtrn2q_u64(ab_odd, cd_odd)));
        }
    }
    static void transpose_part(const uint8_t* rows, int64_t stride, int bytes, uint32_t* to) {
        uint32_t part[8][4] = {};
        for (int row = 0; row < 8; ++row)
            std::memcpy(part[row], rows + row * stride, static_cast<size_t>(bytes));
        for (int word = 0; 4 * word < bytes; ++word)
            for (int row = 0; row < 8; ++row)
                to[64 * word + row] = part[row][word];
    }

    // words [bytes in steps of 16] of four rows
    static void interleave(const uint8_t* rows, int64_t stride, int64_t bytes, uint32_t* to) {
        for (; bytes >= 16; rows += 16, bytes -= 16, to += 16)
            vst4q_u8(reinterpret_cast<uint8_t*>(to), {{vld1q_u8(rows), vld1q_u8(rows + stride),
                                                       vld1q_u8(rows + 2 * stride), vld1q_u8(rows + 3 * stride)}});
        if (bytes > 0) {
            uint8_t part[4][16] = {};
            for (int row = 0; row < 4; ++row)
                std::memcpy(part[row], rows + row * stride, static_cast<size_t>(bytes));
            vst4q_u8(reinterpret_cast<uint8_t*>(to),
                     {{vld1q_u8(part[0]), vld1q_u8(part[1]), vld1q_u8(part[2]), vld1q_u8(part[3])}});
        }
    }

    // the low and the high four bits of each byte as bytes of their own
    static void nibbles(const uint8_t* from, int64_t bytes, uint8_t* to) {
        int64_t i = 0;
        for (; i + 8 <= bytes; i += 8) {
            const uint8x8_t x = vld1_u8(from + i);
            vst2_u8(to + 2 * i, {{vand_u8(x, vdup_n_u8(15)), vshr_n_u8(x, 4)}});
        }
        for (; i < bytes; ++i) {
            to[2 * i] = from[i] & 15;
            to[2 * i + 1] = from[i] >> 4;
        }
    }

  private:
    static uint32x4_t load_words(const uint8_t* from) { return vreinterpretq_u32_u8(vld1q_u8(from)); }
    template <int Shift>
    static int32x4_t shifted(int32x4_t i) {
        if constexpr (Shift > 0)
            return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(i), Shift));
        else if constexpr (Shift < 0)
            return vshlq_n_s32(i, -Shift);
        else
            return i;
    }
};

} // namespace
} // namespace bitpalette
