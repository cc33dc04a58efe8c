// Input transforms for AVX2 and FMA.
#include "input_transform_body.h"

#if BITPALETTE_X86
#include <immintrin.h>

namespace bitpalette {
namespace {

struct Avx2 {
    using Floats = __m256;
    static constexpr int lanes = 8, registers = 8, columns = 2;

    static Floats zero() { return _mm256_setzero_ps(); }
    static Floats all(float value) { return _mm256_set1_ps(value); }
    static Floats load(const float* from) { return _mm256_loadu_ps(from); }
    static void store(float* to, Floats f) { _mm256_storeu_ps(to, f); }
    static Floats plus(Floats a, Floats b) { return _mm256_add_ps(a, b); }
    static Floats minus(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
    static Floats times(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
    static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    // lane j: f[j] + f[j ^ Stride] where the bit of j is clear, f[j ^ Stride] - f[j] where it is set
    template <int Stride>
    static Floats butterfly(Floats f) {
        if constexpr (Stride == 1) {
            const Floats sign = _mm256_setr_ps(0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f);
            return _mm256_add_ps(_mm256_permute_ps(f, 0xB1), _mm256_xor_ps(f, sign));
        } else if constexpr (Stride == 2) {
            const Floats sign = _mm256_setr_ps(0.0f, 0.0f, -0.0f, -0.0f, 0.0f, 0.0f, -0.0f, -0.0f);
            return _mm256_add_ps(_mm256_permute_ps(f, 0x4E), _mm256_xor_ps(f, sign));
        } else {
            const Floats sign = _mm256_setr_ps(0.0f, 0.0f, 0.0f, 0.0f, -0.0f, -0.0f, -0.0f, -0.0f);
            return _mm256_add_ps(_mm256_permute2f128_ps(f, f, 1), _mm256_xor_ps(f, sign));
        }
    }
};

} // namespace

const TransformOps transform_avx2{multiply<Avx2>, hadamard<Avx2>, odd<Avx2>, gather<Avx2>};

} // namespace bitpalette
#endif
