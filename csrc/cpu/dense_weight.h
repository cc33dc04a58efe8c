// Unquantized weights: embeddings, heads and layers that a plan left alone, as torch holds them.
#pragma once

#include "linear.h"

namespace bitpalette {

// Rows begin..end-1 of y, and rows of W in float32: what each instruction set's unit provides for a type of elements.
struct DenseCalls {
    void (*multiply)(const void* w, int64_t in, const FloatInput& x, int64_t tokens, float* y, int64_t y_row,
                     int64_t begin, int64_t end);
    void (*row)(const void* w, int64_t in, float* to);
};

struct DenseUnit {
    DenseCalls of[3]; // by Dtype
};

// W [out, in] row by row, float32, float16 or bfloat16, multiplied in float32.
class DenseWeight : public LinearWeight {
  public:
    // std::invalid_argument for an empty weight or a missing instruction set.
    DenseWeight(Isa isa, const void* values, Dtype dtype, int64_t out, int64_t in);

    InputForm form() const override { return InputForm::f32; }
    int64_t bytes() const override { return out * in * element_; }
    void multiply(const Activations& x, float* y, int64_t y_row, int64_t begin, int64_t end) const override;
    void decode(const int64_t* index, int64_t begin, int64_t end, float* rows) const override;

  private:
    const DenseCalls& calls_;
    const unsigned char* values_;
    int64_t element_; // bytes of one
};

extern const DenseUnit dense_scalar;
#if BITPALETTE_X86
extern const DenseUnit dense_avx2;
extern const DenseUnit dense_avx512;
#endif
#if BITPALETTE_AARCH64
extern const DenseUnit dense_neon;
#endif

} // namespace bitpalette
