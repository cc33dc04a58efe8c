// The kernel for bytes in canonical layout for NEON with dot product.
#include "int8_body.h"

#if BITPALETTE_AARCH64
#include <arm_neon.h>

namespace bitpalette {
namespace {

// The dot product takes signed bytes on both sides, so codes are loaded less 128 and what lanes start from elsewhere,
// -128 times the sum of the input, is not added. Both registers of 16 columns go to one of sums: the input's scale
// belongs to 32 columns at least.
struct Neon {
    using Floats = float32x4_t;
    using Ints = int32x4_t;
    struct Codes {
        int8x16_t a, b;
    };
    using Input = Codes;
    static constexpr int columns = 32, lanes = 4, most_rows = 4, most_tokens = 4;

    static Floats zero() { return vdupq_n_f32(0); }
    static Floats load(const float* from) { return vld1q_f32(from); }
    static Floats multiply_add(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
    static float total(Floats f) { return vpadds_f32(vadd_f32(vget_low_f32(f), vget_high_f32(f))); }
    static Floats to_floats(Ints i) { return vcvtq_f32_s32(i); }
    static Ints no_ints() { return vdupq_n_s32(0); }
    static Ints load_ints(const int32_t*) { return no_ints(); }
    static Codes load_codes(const uint8_t* from) { return {centred(vld1q_u8(from)), centred(vld1q_u8(from + 16))}; }
    static Input load_input(const int8_t* from) { return {vld1q_s8(from), vld1q_s8(from + 16)}; }
    static Ints add_products(Ints start, Codes c, Input x) { return vdotq_s32(vdotq_s32(start, c.a, x.a), c.b, x.b); }
    static Ints combined(Ints high, Ints low) { return vaddq_s32(vshlq_n_s32(high, 8), low); }
    static Floats levels(const uint8_t* from) {
        uint32_t four;
        std::memcpy(&four, from, sizeof four);
        const int8x8_t codes = vreinterpret_s8_u32(vdup_n_u32(four ^ 0x80808080));
        return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(codes))));
    }

  private:
    static int8x16_t centred(uint8x16_t codes) { return vreinterpretq_s8_u8(veorq_u8(codes, vdupq_n_u8(128))); }
};

} // namespace

const Int8Unit int8_neon = int8_unit<Neon>();

} // namespace bitpalette
#endif
