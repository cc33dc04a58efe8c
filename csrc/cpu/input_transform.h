// What a layer does to its input before its weight sees it: the transforms of quant/, one after another.
//
//     multiply   x_j * factor_j                                     signs of `rotate`, factors of `scale`
//     rotate     the orthonormal Hartley-Hadamard transform R x     quant/hartley.py defines it
//     gather     y_j = x_{order_j}                                  `order`
#pragma once

#include <cstdint>
#include <vector>

#include "isa.h"

namespace bitpalette {

class InputTransform {
  public:
    // n: columns of the input. std::invalid_argument for n < 1 or a missing instruction set.
    InputTransform(Isa isa, int64_t n);

    // Steps are done in the order in which they are added.
    void add_multiply(const float* factors); // [n], copied
    void add_rotate();
    void add_gather(const int64_t* order); // [n], copied; std::invalid_argument where it is no permutation

    int64_t n() const { return n_; }

    // x [n] float32 in place. room: n floats.
    void apply(float* x, float* room) const;

  private:
    struct Step {
        enum class Kind { multiply, rotate, gather } kind;
        std::vector<float> factors;
        std::vector<int32_t> order;
    };

    Isa isa_;
    int64_t n_;
    std::vector<Step> steps_;
    std::vector<float> odd_; // the discrete Hartley matrix of the odd part of n [p, p], where a step rotates
};

} // namespace bitpalette
