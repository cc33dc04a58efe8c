#include "trellis_input.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

namespace bitpalette {
namespace {

// Between vectors, since rows a multiple of 4 KiB apart would compete for one set of the first-level cache.
constexpr int64_t gap = 32;

// 256 floats to high and low; returns the scale of low. Powers of two, so that scaling is exact.
float split_block(const float* x, int16_t* high, int16_t* low) {
    constexpr int bits = 29, low_bits = 15;
    float largest = 0;
    bool finite = true;
    for (int i = 0; i < trellis_block; ++i) {
        const float size = std::fabs(x[i]);
        finite &= size <= FLT_MAX;
        largest = std::max(largest, size);
    }
    if (!finite) {
        std::fill_n(high, trellis_block, int16_t{0});
        std::fill_n(low, trellis_block, int16_t{0});
        return NAN;
    }
    int exponent;
    std::frexp(largest, &exponent); // largest < 2^exponent
    exponent = std::min(bits - exponent, 126);
    const float up = std::ldexp(1.0f, exponent);
    for (int i = 0; i < trellis_block; ++i) {
        const int32_t value = static_cast<int32_t>(x[i] * up);
        const int32_t upper = (value + (1 << (low_bits - 1))) >> low_bits;
        high[i] = static_cast<int16_t>(upper);
        low[i] = static_cast<int16_t>(value - upper * (1 << low_bits)); // a shift of what is negative is undefined
    }
    return std::ldexp(1.0f, -exponent);
}

} // namespace

void TrellisInput::set(const Activations& x, InputForm form) {
    const bool floats = form == InputForm::f32;
    columns_ = floats ? x.floats().row : x.int8(form).row;
    per_token_ = floats ? 2 : 1;
    vectors_ = x.tokens() * per_token_;
    blocks_ = columns_ / trellis_block;
    row_ = columns_ + gap;
    narrow_ = form == InputForm::int8_by_256;
    values_.resize(static_cast<size_t>(vectors_ * row_));
    twice_.resize(narrow_ ? static_cast<size_t>(vectors_ * row_ * 2) : 0);
    scale_.resize(static_cast<size_t>(vectors_ * blocks_));
    if (floats)
        set_floats(x.floats());
    else if (narrow_)
        set_int8(x.int8(form));
    else
        set_int16(x.int8(form));
    add_offsets();
}

TrellisVectors TrellisInput::part(int64_t first, int n) const {
    return {values_.data() + first * row_,
            narrow_ ? twice_.data() + first * row_ * 2 : nullptr,
            offset_.data() + first * blocks_ * trellis_pairs,
            scale_.data() + first * blocks_,
            row_,
            blocks_,
            n};
}

void TrellisInput::set_int8(const Int8Blocks& x) {
    for (int64_t v = 0; v < vectors_; ++v) {
        const int8_t* from = x.codes + v * columns_;
        int16_t* to = values_.data() + v * row_;
        int8_t* twice = twice_.data() + v * row_ * 2;
        for (int64_t i = 0; i < columns_; ++i)
            to[i] = from[i];
        for (int64_t i = 0; i < columns_; ++i)
            twice[2 * i] = twice[2 * i + 1] = from[i];
    }
    std::copy_n(x.scale, vectors_ * blocks_, scale_.data());
}

void TrellisInput::set_int16(const Int8Blocks& x) {
    for (int64_t v = 0; v < vectors_; ++v) {
        const int8_t *codes = x.codes + v * columns_, *low = x.low + v * columns_;
        int16_t* to = values_.data() + v * row_;
        for (int64_t i = 0; i < columns_; ++i)
            to[i] = static_cast<int16_t>(codes[i] * 256 + low[i]);
    }
    for (size_t b = 0; b < scale_.size(); ++b)
        scale_[b] = x.scale[b] * (1.0f / 256);
}

void TrellisInput::set_floats(const FloatInput& x) {
    for (int64_t v = 0; v < vectors_; v += 2)
        for (int64_t b = 0; b < blocks_; ++b) {
            int16_t* high = values_.data() + v * row_ + b * trellis_block;
            float* scale = scale_.data() + v * blocks_ + b;
            scale[blocks_] = split_block(x.values + v / 2 * columns_ + b * trellis_block, high, high + row_);
            scale[0] = scale[blocks_] * (1 << 15);
        }
}

void TrellisInput::add_offsets() {
    offset_.resize(static_cast<size_t>(vectors_ * blocks_ * trellis_pairs));
    int32_t* offset = offset_.data();
    for (int64_t v = 0; v < vectors_; ++v)
        for (int64_t b = 0; b < blocks_; ++b, offset += trellis_pairs) {
            const int16_t* x = values_.data() + v * row_ + b * trellis_block;
            int32_t sum[trellis_side] = {};
            for (int tile = 0; tile < trellis_block_tiles; ++tile)
                for (int i = 0; i < trellis_side; ++i)
                    sum[i] += x[tile * trellis_side + i];
            for (int j = 0; j < trellis_pairs; ++j)
                offset[j] = -510 * (sum[2 * j] + sum[2 * j + 1]);
        }
}

} // namespace bitpalette
