// Input transforms for AVX-512.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // gcc 12's own avx512fintrin.h, hundreds of lines of it
#endif
#include "input_transform_body.h"

#if BITPALETTE_X86
#include <immintrin.h>

namespace bitpalette {
namespace {

struct Avx512 {
    using Floats = __m512;
    static constexpr int lanes = 16, registers = 16, columns = 4;

    static Floats zero() { return _mm512_setzero_ps(); }
    static Floats all(float value) { return _mm512_set1_ps(value); }
    static Floats load(const float* from) { return _mm512_loadu_ps(from); }
    static void store(float* to, Floats f) { _mm512_storeu_ps(to, f); }
    static Floats plus(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static Floats minus(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
    static Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    // lane j: f[j] + f[j ^ Stride] where the bit of j is clear, f[j ^ Stride] - f[j] where it is set
    template <int Stride>
    static Floats butterfly(Floats f) {
        constexpr __mmask16 set = Stride == 1 ? 0xAAAA : Stride == 2 ? 0xCCCC : Stride == 4 ? 0xF0F0 : 0xFF00;
        Floats other;
        if constexpr (Stride == 1)
            other = _mm512_permute_ps(f, 0xB1);
        else if constexpr (Stride == 2)
            other = _mm512_permute_ps(f, 0x4E);
        else if constexpr (Stride == 4)
            other = _mm512_shuffle_f32x4(f, f, 0xB1);
        else
            other = _mm512_shuffle_f32x4(f, f, 0x4E);
        return _mm512_mask_sub_ps(_mm512_add_ps(f, other), set, other, f);
    }
};

} // namespace

const TransformOps transform_avx512{multiply<Avx512>, hadamard<Avx512>, odd<Avx512>, gather<Avx512>};

} // namespace bitpalette
#endif
