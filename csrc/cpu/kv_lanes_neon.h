// What kv_products.h needs beyond float lanes, for NEON with the dot product. Included by units compiled for it only.
#pragma once

#include "float_lanes_neon.h"

namespace bitpalette {
namespace {

struct KvNeon : Neon {
    struct Ints {
        int32x4_t a, b;
    };
    static constexpr int tile_rows = 4, tile_sums = 8;
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
    static Ints with_bits_of(Ints low, Ints x, uint32_t mask) {
        const Ints high = both(x, mask);
        return {vorrq_s32(low.a, high.a), vorrq_s32(low.b, high.b)};
    }
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

    // words [4, 64] (columns 0..7) of 16 bytes of 8 rows; paired: of the even bytes of eight, then of the odd ones
    template <bool Paired>
    static void transpose(const uint8_t* rows, int64_t stride, uint32_t* to) {
        for (int half = 0; half < 2; ++half, rows += 4 * stride, to += 4) {
            uint32x4_t w[4];
            transposed<Paired>(rows, stride, w);
            for (int i = 0; i < 4; ++i)
                vst1q_u32(to + 64 * i, w[i]);
        }
    }
    template <bool Paired>
    static void transpose_part(const uint8_t* rows, int64_t stride, int bytes, uint32_t* to) {
        uint8_t part[8][16] = {};
        for (int row = 0; row < 8; ++row)
            std::memcpy(part[row], rows + row * stride, static_cast<size_t>(bytes));
        for (int half = 0; half < 2; ++half, to += 4) {
            uint32x4_t w[4];
            transposed<Paired>(part[4 * half], 16, w);
            for (int i = 0; i < (Paired ? (bytes + 7) / 8 * 2 : (bytes + 3) / 4); ++i)
                vst1q_u32(to + 64 * i, w[i]);
        }
    }

    // words [2, columns] of four rows each, of eight rows of `bytes`
    static void interleave(const uint8_t* rows, int64_t stride, int64_t bytes, int64_t columns, uint32_t* to) {
        for (int half = 0; half < 2; ++half)
            for (int64_t k = 0; k < bytes; k += 16)
                interleave16(rows + 4 * half * stride + k, stride, bytes - k, to + half * columns + k);
    }

    // low [2, columns]: words of even bytes, then those of odd ones; high [2, columns / 2]: words of the bytes after
    // the first plane's
    static void interleave_planes(const uint8_t* rows, int64_t stride, int64_t bytes, int64_t columns, uint32_t* low,
                                  uint32_t* high) {
        for (int half = 0; half < 2; ++half)
            for (int64_t k = 0; 2 * k < bytes; k += 16) {
                const uint8_t* from = rows + 4 * half * stride;
                uint8x16x4_t even, odd;
                for (int row = 0; row < 4; ++row) {
                    const uint8_t* at = from + row * stride + 2 * k;
                    uint8_t part[32] = {};
                    if (bytes - 2 * k < 32)
                        at = static_cast<const uint8_t*>(std::memcpy(part, at, static_cast<size_t>(bytes - 2 * k)));
                    const uint8x16x2_t both_kinds = vld2q_u8(at);
                    even.val[row] = both_kinds.val[0], odd.val[row] = both_kinds.val[1];
                }
                uint32_t* to = low + half * columns + k;
                vst4q_u8(reinterpret_cast<uint8_t*>(to), even);
                vst4q_u8(reinterpret_cast<uint8_t*>(to + columns / 2), odd);
                interleave16(from + bytes + k, stride, bytes / 2 - k, high + half * (columns / 2) + k);
            }
    }

  private:
    template <bool Paired>
    static uint32x4_t load_words(const uint8_t* from) {
        uint8x16_t x = vld1q_u8(from);
        if (Paired) {
            static constexpr uint8_t order[16] = {0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15};
            x = vqtbl1q_u8(x, vld1q_u8(order));
        }
        return vreinterpretq_u32_u8(x);
    }
    template <bool Paired>
    static void transposed(const uint8_t* rows, int64_t stride, uint32x4_t* w) {
        const uint32x4_t a = load_words<Paired>(rows), b = load_words<Paired>(rows + stride),
                         c = load_words<Paired>(rows + 2 * stride), d = load_words<Paired>(rows + 3 * stride);
        const uint64x2_t ab = vreinterpretq_u64_u32(vtrn1q_u32(a, b)), cd = vreinterpretq_u64_u32(vtrn1q_u32(c, d));
        const uint64x2_t ab_odd = vreinterpretq_u64_u32(vtrn2q_u32(a, b)),
                         cd_odd = vreinterpretq_u64_u32(vtrn2q_u32(c, d));
        w[0] = vreinterpretq_u32_u64(vtrn1q_u64(ab, cd));
        w[1] = vreinterpretq_u32_u64(vtrn1q_u64(ab_odd, cd_odd));
        w[2] = vreinterpretq_u32_u64(vtrn2q_u64(ab, cd));
        w[3] = vreinterpretq_u32_u64(vtrn2q_u64(ab_odd, cd_odd));
    }
    // up to 16 bytes of four rows
    static void interleave16(const uint8_t* rows, int64_t stride, int64_t n, uint32_t* to) {
        uint8_t part[4][16] = {};
        if (n < 16) {
            for (int row = 0; row < 4; ++row)
                std::memcpy(part[row], rows + row * stride, static_cast<size_t>(n));
            rows = part[0], stride = 16;
        }
        vst4q_u8(reinterpret_cast<uint8_t*>(to), {{vld1q_u8(rows), vld1q_u8(rows + stride), vld1q_u8(rows + 2 * stride),
                                                   vld1q_u8(rows + 3 * stride)}});
    }
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
