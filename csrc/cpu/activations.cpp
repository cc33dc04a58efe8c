#include "activations.h"

#include <cfloat>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>

#include "half.h"
#include "input_transform.h"

namespace bitpalette {
namespace {

constexpr int64_t row_columns = 256; // rows are whole blocks of every form
constexpr size_t line = 64;

int block_of(InputForm form) {
    return form == InputForm::int8_by_32 ? 32 : 256;
}

// n values to codes (and low) at n of a block; returns the scale. sum: of what the codes say.
float quantize_block(const float* x, int n, int8_t* codes, int8_t* low, int32_t* sum) {
    float largest = 0;
    bool finite = true;
    for (int i = 0; i < n; ++i) {
        finite &= std::fabs(x[i]) <= FLT_MAX;
        largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
    }
    *sum = 0;
    if (!finite || largest < 32512 * FLT_MIN) { // or 32512 / largest overflows
        for (int i = 0; i < n; ++i) {
            codes[i] = 0;
            if (low != nullptr)
                low[i] = 0;
        }
        return finite ? 0.0f : NAN;
    }
    const float units = low == nullptr ? 127.0f : 32512.0f; // 127 * 256
    const float inverse = units / largest;
    for (int i = 0; i < n; ++i) {
        const int32_t code = static_cast<int32_t>(std::lrintf(x[i] * inverse));
        *sum += code;
        const int32_t high = low == nullptr ? code : (code + 128) >> 8;
        codes[i] = static_cast<int8_t>(high);
        if (low != nullptr)
            low[i] = static_cast<int8_t>(code - high * 256);
    }
    return largest / 127.0f;
}

} // namespace

void Activations::set(const void* x, Dtype dtype, int64_t tokens, int64_t in, const InputTransform* transform) {
    if (transform != nullptr && transform->n() != in)
        throw std::invalid_argument("a transform of " + std::to_string(transform->n()) + " columns, an input of " +
                                    std::to_string(in));
    tokens_ = tokens, in_ = in, row_ = (in + row_columns - 1) / row_columns * row_columns;
    for (Quantized& q : quantized_)
        q.made = false;
    room_.resize(static_cast<size_t>(tokens * row_) + line / sizeof(float));
    spare_.resize(static_cast<size_t>(in));
    void* at = room_.data();
    size_t bytes = room_.size() * sizeof(float);
    values_ = static_cast<float*>(std::align(line, static_cast<size_t>(tokens * row_) * sizeof(float), at, bytes));
    for (int64_t t = 0; t < tokens; ++t) {
        float* to = values_ + t * row_;
        for (int64_t i = 0; i < in; ++i)
            to[i] = load_element(x, dtype, t * in + i);
        for (int64_t i = in; i < row_; ++i)
            to[i] = 0;
        if (transform != nullptr)
            transform->apply(to, spare_.data());
    }
}

void Activations::need(InputForm form) {
    Quantized& q = quantized_[static_cast<int>(form)];
    if (form == InputForm::f32 || q.made)
        return;
    const int block = block_of(form);
    const bool planes = form == InputForm::int16_by_256;
    const size_t size = static_cast<size_t>(tokens_ * row_);
    q.codes.resize(size);
    q.low.resize(planes ? size : 0);
    q.scale.resize(size / static_cast<size_t>(block));
    q.sum.resize(q.scale.size());
    for (size_t b = 0; b < q.scale.size(); ++b) {
        const size_t first = b * static_cast<size_t>(block);
        int8_t* low = planes ? q.low.data() + first : nullptr;
        q.scale[b] = quantize_block(values_ + first, block, q.codes.data() + first, low, &q.sum[b]);
    }
    q.made = true;
}

Int8Blocks Activations::int8(InputForm form) const {
    const Quantized& q = quantized_[static_cast<int>(form)];
    const int8_t* low = q.low.empty() ? nullptr : q.low.data();
    return {q.codes.data(), low, q.scale.data(), q.sum.data(), row_, block_of(form)};
}

} // namespace bitpalette
