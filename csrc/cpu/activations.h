// The input of a linear layer, or of several that share it, in the forms that kernels read. Each form is made once.
#pragma once

#include <cstdint>
#include <vector>

#include "dtype.h"
#include "isa.h"

namespace bitpalette {

class InputTransform;

enum class InputForm {
    f32,
    int8_by_32,   // a scale for 32 columns: as close as int8 gets, for inputs with outliers
    int8_by_256,  // a scale for 256 columns: enough for rotated inputs
    int16_by_256, // two planes of int8, close to exact
    int8_by_128,  // between the first two: where many tokens meet, a scale for 32 columns costs a quarter of the time
};

// [tokens, row], rows on cache lines, zero from the input's last column to the end of the row, a multiple of 256.
struct FloatInput {
    const float* values;
    int64_t row;
};

// Value = (code + low / 256) * scale, rows and blocks zero-filled as above. A block that holds NaN or infinity has
// scale NaN, which reaches every output.
struct Int8Blocks {
    const int8_t* codes; // [tokens, row]
    const int8_t* low;   // [tokens, row] with two planes, else null
    const float* scale;  // [tokens, row / block]
    const int32_t* sum;  // [tokens, row / block], of a block's codes; with two planes of 256 * code + low
    int64_t row;
    int block;
};

// Columns that share a scale; 1 for f32.
constexpr int input_block(InputForm form) {
    return form == InputForm::f32 ? 1 : form == InputForm::int8_by_32 ? 32 : form == InputForm::int8_by_128 ? 128 : 256;
}

class Activations {
  public:
    explicit Activations(Isa isa) : isa_(isa) {}

    // x [tokens, in] of the given type, transformed (null: as it is). Buffers are kept from call to call.
    void set(const void* x, Dtype dtype, int64_t tokens, int64_t in, const InputTransform* transform, int threads = 1);
    // Makes a form where it is not there yet. Called by one thread.
    void need(InputForm form, int threads = 1);

    int64_t tokens() const { return tokens_; }
    int64_t in() const { return in_; }
    FloatInput floats() const { return {values_, row_}; }
    Int8Blocks int8(InputForm form) const;

  private:
    struct Quantized {
        bool made = false;
        std::vector<int8_t> codes, low;
        std::vector<float> scale;
        std::vector<int32_t> sum;
    };

    Isa isa_;
    int64_t tokens_ = 0, in_ = 0, row_ = 0;
    float* values_ = nullptr;
    std::vector<float> room_, spare_;
    Quantized quantized_[5];
};

} // namespace bitpalette
