// The steps of InputTransform on one row, once for each instruction set. Rows are padded with zeros to a multiple of
// transform_columns, and so are the arrays of a step; pointers need no alignment. n counts the padded columns.
#pragma once

#include <cstdint>

#include "isa.h"

namespace bitpalette {

constexpr int64_t transform_columns = 16;

// The odd factor of a rotation of p * width columns: a symmetric matrix [p, row] of floats, zero from column p on.
struct OddFactor {
    const float* matrix;
    int64_t p, row;
    int64_t width; // a power of two
};

struct TransformOps {
    void (*multiply)(float* x, const float* factors, int64_t n);
    // x = H x within each run of `width` columns, a power of two; entries of H are 1 and -1.
    void (*hadamard)(float* x, int64_t n, int64_t width);
    // to[i, j] = sum over k of matrix[i, k] * from[k, j], rows of `width`. Leaves columns from p * width on alone.
    void (*odd)(const float* from, const OddFactor& factor, float* to);
    void (*gather)(const float* from, const int32_t* order, int64_t n, float* to);
};

extern const TransformOps transform_scalar, transform_avx2, transform_avx512, transform_neon;

} // namespace bitpalette
