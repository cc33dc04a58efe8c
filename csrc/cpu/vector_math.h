// What a decoder computes between its linear layers, in float32: norms, gated activations, rotary embeddings.
#pragma once

#include <cstdint>

#include "isa.h"

namespace bitpalette {

struct VectorMath {
    // y_i = x_i * gain_i / sqrt(mean(x^2) + eps); y may be x
    void (*rms_norm)(const float* x, const float* gain, float eps, int64_t n, float* y);
    // gate_i = f(gate_i) * up_i, f(x) = x / (1 + e^-x)
    void (*silu_multiply)(float* gate, const float* up, int64_t n);
    // the same for GELU by its approximation with tanh (Hendrycks and Gimpel, arXiv 1606.08415)
    void (*gelu_tanh_multiply)(float* gate, const float* up, int64_t n);
    // y_i += x_i
    void (*add)(const float* x, int64_t n, float* y);
    // Rotary embedding: pairs (x_i, x_{i + half}) turned by angle i. x [2 * half] in place.
    void (*turn)(float* x, const float* cosine, const float* sine, int64_t half);
};

// std::invalid_argument for a missing instruction set.
const VectorMath& vector_math(Isa isa);

extern const VectorMath vector_math_scalar;
#if BITPALETTE_X86
extern const VectorMath vector_math_avx2;
extern const VectorMath vector_math_avx512;
#endif
#if BITPALETTE_AARCH64
extern const VectorMath vector_math_neon;
#endif

} // namespace bitpalette
