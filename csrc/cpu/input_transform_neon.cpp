// Input transforms for NEON.
#include "input_transform_body.h"

#if BITPALETTE_AARCH64
#include <arm_neon.h>

namespace bitpalette {
namespace {

struct Neon {
    using Floats = float32x4_t;
    static constexpr int lanes = 4, registers = 16, columns = 4;

    static Floats zero() { return vdupq_n_f32(0); }
    static Floats all(float value) { return vdupq_n_f32(value); }
    static Floats load(const float* from) { return vld1q_f32(from); }
    static void store(float* to, Floats f) { vst1q_f32(to, f); }
    static Floats plus(Floats a, Floats b) { return vaddq_f32(a, b); }
    static Floats minus(Floats a, Floats b) { return vsubq_f32(a, b); }
    static Floats times(Floats a, Floats b) { return vmulq_f32(a, b); }
    static Floats multiply_add(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
    // lane j: f[j] + f[j ^ Stride] where the bit of j is clear, f[j ^ Stride] - f[j] where it is set; f times 1 or -1
    // is exact, so the multiply-add rounds once as an addition does
    template <int Stride>
    static Floats butterfly(Floats f) {
        if constexpr (Stride == 1) {
            const Floats sign = {1, -1, 1, -1};
            return vfmaq_f32(vrev64q_f32(f), f, sign);
        } else {
            const Floats sign = {1, 1, -1, -1};
            return vfmaq_f32(vextq_f32(f, f, 2), f, sign);
        }
    }
};

} // namespace

const TransformOps transform_neon{multiply<Neon>, hadamard<Neon>, odd<Neon>, gather<Neon>};

} // namespace bitpalette
#endif
