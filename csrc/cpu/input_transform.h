// What a layer does to its input before its weight sees it: the transforms of quant/, one after another.
//
//     multiply   x_j * factor_j                                     signs of `rotate`, factors of `scale`
//     rotate     the orthonormal Hartley-Hadamard transform R x     quant/hartley.py defines it
//     gather     y_j = x_{order_j}                                  `order`
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "activations_ops.h"
#include "dtype.h"
#include "input_transform_ops.h"
#include "isa.h"

namespace bitpalette {

class InputTransform {
  public:
    // Of the odd part of n, where a step rotates: its matrix takes 4 MiB then, and the FFT of quant/hartley.py, which
    // takes over there, has less work.
    static constexpr int64_t most_odd = 1024;

    // n: columns of the input. std::invalid_argument for n < 1 or a missing instruction set.
    InputTransform(Isa isa, int64_t n);

    // Steps are done in the order in which they are added.
    void add_multiply(const float* factors); // [n], copied
    void add_rotate();                       // std::invalid_argument where the odd part of n is above most_odd
    void add_gather(const int64_t* order);   // [n], copied; std::invalid_argument where it is no permutation

    int64_t n() const { return n_; }
    // Columns of a row that is written, with those that fill it up.
    int64_t padded() const { return (n_ + transform_columns - 1) / transform_columns * transform_columns; }

    // to [padded] = T x in float32, then zeros. x [n] of dtype. room [padded]: overwritten.
    void apply(const void* x, Dtype dtype, float* to, float* room) const;

    // y [tokens, n] = T x for every row of x [tokens, n]; they may be the same.
    void apply_rows(const float* x, float* y, int64_t tokens, int threads) const;

  private:
    struct Step {
        enum class Kind { multiply, hadamard, odd, gather } kind;
        std::vector<float> factors; // [padded]
        std::vector<int32_t> order; // [padded]
        OddFactor odd;
        std::shared_ptr<const std::vector<float>> matrix; // of `odd`
    };

    bool moves(const Step& step) const { return step.kind == Step::Kind::odd || step.kind == Step::Kind::gather; }

    const ActivationOps& load_;
    const TransformOps& ops_;
    int64_t n_;
    std::vector<Step> steps_;
};

} // namespace bitpalette
