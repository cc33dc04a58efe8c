// Codec `int` at 8 bits, symmetric, a scale a row, straight from the canonical layout: y = x W^T in float32.
//
//     codes  uint8 [out, in]   value = (code - 128) * scale[row]
//
// A row's codes are widened to floats once, in the first-level cache, and multiplied with every token.
#pragma once

#include <cstdint>

#include "isa.h"

namespace bitpalette {

struct Int8Weight {
    const uint8_t* codes;
    const float* scale; // [out]
    int64_t out, in;
};

// One instruction set's translation unit: rows begin..end-1 of y [tokens, out] for x [tokens, in]. row: room for one
// row [in].
using Int8Rows = void (*)(const Int8Weight& w, const float* x, int64_t tokens, float* y, int64_t begin, int64_t end,
                          float* row);

extern const Int8Rows int8_scalar;
#if BITPALETTE_X86
extern const Int8Rows int8_avx2;
extern const Int8Rows int8_avx512;
#endif

// On up to `threads` threads. std::invalid_argument for an instruction set that this machine lacks or sizes below 1.
void int8_linear(Isa isa, const Int8Weight& w, const float* x, int64_t tokens, float* y, int threads);

} // namespace bitpalette
