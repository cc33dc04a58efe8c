// Float32 lanes for NEON: two registers of 4, so that chains of additions are eight lanes wide as elsewhere. Included
// by units compiled for it only.
#pragma once

#include <arm_neon.h>

#include "float_lanes.h"

namespace bitpalette {
namespace {

struct Neon {
    struct Floats {
        float32x4_t a, b;
    };
    static constexpr int lanes = 8;
    static constexpr int registers = 16; // of these pairs

    static Floats zero() { return all(0); }
    static Floats all(float value) { return {vdupq_n_f32(value), vdupq_n_f32(value)}; }
    static Floats add(Floats a, Floats b) { return {vaddq_f32(a.a, b.a), vaddq_f32(a.b, b.b)}; }
    static Floats subtract(Floats a, Floats b) { return {vsubq_f32(a.a, b.a), vsubq_f32(a.b, b.b)}; }
    static Floats multiply(Floats a, Floats b) { return {vmulq_f32(a.a, b.a), vmulq_f32(a.b, b.b)}; }
    static Floats divide(Floats a, Floats b) { return {vdivq_f32(a.a, b.a), vdivq_f32(a.b, b.b)}; }
    static Floats multiply_add(Floats a, Floats b, Floats c) {
        return {vfmaq_f32(c.a, a.a, b.a), vfmaq_f32(c.b, a.b, b.b)};
    }
    // b where one of the two is NaN, which fmin and fmax are not
    static Floats minimum(Floats a, Floats b) { return {less(a.a, b.a, a.a, b.a), less(a.b, b.b, a.b, b.b)}; }
    static Floats maximum(Floats a, Floats b) { return {less(b.a, a.a, a.a, b.a), less(b.b, a.b, a.b, b.b)}; }
    static float total(Floats f) {
        const float32x4_t four = vaddq_f32(f.a, f.b);
        const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
        return vpadds_f32(two);
    }
    // total(f[i]) at lane i
    static Floats totals(const Floats (&f)[lanes]) {
        const auto fours = [&](int i) { return vaddq_f32(f[i].a, f[i].b); };
        const float32x4_t low = vpaddq_f32(fours(0), fours(1)), next = vpaddq_f32(fours(2), fours(3));
        const float32x4_t third = vpaddq_f32(fours(4), fours(5)), high = vpaddq_f32(fours(6), fours(7));
        return {vpaddq_f32(low, next), vpaddq_f32(third, high)};
    }
    static float largest(Floats f) { return vmaxnmvq_f32(vmaxnmq_f32(f.a, f.b)); }
    // y * 2^n for the n in the low bits of `shifted`: added to y's exponent
    static Floats times_power_of_two(Floats y, Floats shifted) {
        return {raised(y.a, shifted.a), raised(y.b, shifted.b)};
    }

    static Floats load(const float* from) { return {vld1q_f32(from), vld1q_f32(from + 4)}; }
    static Floats load(const Bf16* from) {
        const uint16x8_t halves = vld1q_u16(&from->bits);
        return {vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vget_low_u16(halves)), 16)),
                vreinterpretq_f32_u32(vshlq_n_u32(vmovl_high_u16(halves), 16))};
    }
    static Floats load(const Fp16* from) {
        const float16x8_t halves = vreinterpretq_f16_u16(vld1q_u16(&from->bits));
        return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
    }
    // the first n of 8, 0 for the others
    template <class T>
    static Floats load(const T* from, int n) {
        T part[lanes] = {};
        std::memcpy(part, from, static_cast<size_t>(n) * sizeof(T));
        return load(part);
    }
    static void store(float* to, Floats f) {
        vst1q_f32(to, f.a);
        vst1q_f32(to + 4, f.b);
    }
    static void store(float* to, Floats f, int n) {
        float part[lanes];
        store(part, f);
        std::memcpy(to, part, static_cast<size_t>(n) * sizeof(float));
    }

  private:
    static float32x4_t less(float32x4_t a, float32x4_t b, float32x4_t then, float32x4_t otherwise) {
        return vbslq_f32(vcltq_f32(a, b), then, otherwise);
    }
    static float32x4_t raised(float32x4_t y, float32x4_t shifted) {
        const int32x4_t n = vshlq_n_s32(vreinterpretq_s32_f32(shifted), 23);
        return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(y), n));
    }
};

} // namespace
} // namespace bitpalette
