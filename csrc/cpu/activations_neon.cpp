// Activations for NEON: 16 values are four registers.
#include "activations_body.h"

#if BITPALETTE_AARCH64
#include <arm_neon.h>

namespace bitpalette {
namespace {

struct Neon {
    static constexpr int lanes = 16;
    struct Floats {
        float32x4_t a, b, c, d;
    };
    struct Ints {
        int32x4_t a, b, c, d;
    };

    template <Dtype D>
    static Floats load(const void* from, int64_t i) {
        if constexpr (D == Dtype::f32) {
            const float* at = static_cast<const float*>(from) + i;
            return {vld1q_f32(at), vld1q_f32(at + 4), vld1q_f32(at + 8), vld1q_f32(at + 12)};
        } else {
            const uint16_t* at = static_cast<const uint16_t*>(from) + i;
            const uint16x8_t low = vld1q_u16(at), high = vld1q_u16(at + 8);
            return {widened<D>(vget_low_u16(low)), widened<D>(vget_high_u16(low)), widened<D>(vget_low_u16(high)),
                    widened<D>(vget_high_u16(high))};
        }
    }
    static void store(float* to, Floats f) {
        vst1q_f32(to, f.a);
        vst1q_f32(to + 4, f.b);
        vst1q_f32(to + 8, f.c);
        vst1q_f32(to + 12, f.d);
    }
    template <Dtype D>
    static void store(void* to, int64_t i, Floats f) {
        if constexpr (D == Dtype::f32) {
            store(static_cast<float*>(to) + i, f);
        } else {
            uint16_t* at = static_cast<uint16_t*>(to) + i;
            vst1q_u16(at, vcombine_u16(narrowed<D>(f.a), narrowed<D>(f.b)));
            vst1q_u16(at + 8, vcombine_u16(narrowed<D>(f.c), narrowed<D>(f.d)));
        }
    }
    static Floats times(Floats x, Floats y) {
        return {vmulq_f32(x.a, y.a), vmulq_f32(x.b, y.b), vmulq_f32(x.c, y.c), vmulq_f32(x.d, y.d)};
    }
    static Floats plus(Floats x, Floats y) {
        return {vaddq_f32(x.a, y.a), vaddq_f32(x.b, y.b), vaddq_f32(x.c, y.c), vaddq_f32(x.d, y.d)};
    }

    static Ints integer(int32_t value) {
        const int32x4_t four = vdupq_n_s32(value);
        return {four, four, four, four};
    }
    static Ints plus(Ints x, Ints y) {
        return {vaddq_s32(x.a, y.a), vaddq_s32(x.b, y.b), vaddq_s32(x.c, y.c), vaddq_s32(x.d, y.d)};
    }
    static Ints magnitude(Floats f) {
        const auto bits = [](float32x4_t four) { return vreinterpretq_s32_f32(vabsq_f32(four)); };
        return {bits(f.a), bits(f.b), bits(f.c), bits(f.d)};
    }
    static Ints largest(Ints x, Ints y) {
        return {vmaxq_s32(x.a, y.a), vmaxq_s32(x.b, y.b), vmaxq_s32(x.c, y.c), vmaxq_s32(x.d, y.d)};
    }
    static int32_t largest_of(Ints i) { return vmaxvq_s32(vmaxq_s32(vmaxq_s32(i.a, i.b), vmaxq_s32(i.c, i.d))); }
    static int32_t sum_of(Ints i) { return vaddvq_s32(vaddq_s32(vaddq_s32(i.a, i.b), vaddq_s32(i.c, i.d))); }
    // to nearest even, whatever the rounding mode
    static Ints rounded(Floats f, float by) {
        return {vcvtnq_s32_f32(vmulq_n_f32(f.a, by)), vcvtnq_s32_f32(vmulq_n_f32(f.b, by)),
                vcvtnq_s32_f32(vmulq_n_f32(f.c, by)), vcvtnq_s32_f32(vmulq_n_f32(f.d, by))};
    }
    static Ints shifted_right_8(Ints i) {
        return {vshrq_n_s32(i.a, 8), vshrq_n_s32(i.b, 8), vshrq_n_s32(i.c, 8), vshrq_n_s32(i.d, 8)};
    }
    static void store_bytes(int8_t* to, Ints i) {
        const int16x8_t low = vuzp1q_s16(vreinterpretq_s16_s32(i.a), vreinterpretq_s16_s32(i.b));
        const int16x8_t high = vuzp1q_s16(vreinterpretq_s16_s32(i.c), vreinterpretq_s16_s32(i.d));
        vst1q_s8(to, vuzp1q_s8(vreinterpretq_s8_s16(low), vreinterpretq_s8_s16(high)));
    }

  private:
    template <Dtype D>
    static float32x4_t widened(uint16x4_t halves) {
        if constexpr (D == Dtype::f16)
            return vcvt_f32_f16(vreinterpret_f16_u16(halves));
        else
            return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(halves), 16));
    }
    template <Dtype D>
    static uint16x4_t narrowed(float32x4_t f) {
        if constexpr (D == Dtype::f16)
            return vreinterpret_u16_f16(vcvt_f16_f32(f));
        else
            return bf16(f);
    }
    // as bf16_of_float in half.h
    static uint16x4_t bf16(float32x4_t f) {
        const uint32x4_t bits = vreinterpretq_u32_f32(f), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        const uint16x4_t even = vshrn_n_u32(vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7FFF)), odd), 16);
        const uint16x4_t quiet = vorr_u16(vshrn_n_u32(bits, 16), vdup_n_u16(0x40));
        return vbsl_u16(vmovn_u32(vceqq_f32(f, f)), even, quiet);
    }
};

} // namespace

const ActivationOps activations_neon{load<Neon>, quantize<Neon>, store<Neon>};

} // namespace bitpalette
#endif
