// The inner loops of Activations and of store_outputs, once for each instruction set.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace bitpalette {

struct ActivationOps {
    // to[i] = from[i] in float32, times factors[i] where there are any.
    void (*load)(const void* from, Dtype dtype, int64_t n, const float* factors, float* to);
    // Blocks of 32, 128 or 256 values (with low: 256) to codes (and low, else null), scale and sum; see Int8Blocks.
    // Rounds to nearest even.
    void (*quantize)(const float* x, int64_t blocks, int block, int8_t* codes, int8_t* low, float* scale, int32_t* sum);
    // to[i] = from[i] + bias[i] (null: none), of the given type, as is the bias. Rounds to nearest even.
    void (*store)(const float* from, const void* bias, Dtype dtype, int64_t n, void* to);
};

extern const ActivationOps activations_scalar, activations_avx2, activations_avx512, activations_neon;

const ActivationOps& activation_ops(Isa isa);

} // namespace bitpalette
