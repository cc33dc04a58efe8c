#include "activations.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>

#include "activations_ops.h"
#include "input_transform.h"
#include "parallel.h"

namespace bitpalette {
namespace {

constexpr int64_t row_columns = 256; // rows are whole blocks of every form
constexpr size_t line = 64;

// Below this many columns a thread (about 10 us), waking another one (about 2 us) costs more than it saves.
constexpr int64_t columns_per_thread = 8192;

int useful_threads(int64_t columns, int64_t tokens, int threads) {
    return static_cast<int>(
        std::clamp<int64_t>(columns / columns_per_thread, 1, std::max<int64_t>(std::min<int64_t>(threads, tokens), 1)));
}

// Layers of different widths take turns with the same buffers: what grows once must not be cleared at every turn.
template <class T>
void grow(std::vector<T>& buffer, size_t n) {
    if (buffer.size() < n)
        buffer.resize(n);
}

} // namespace

const ActivationOps& activation_ops(Isa isa) {
#if BITPALETTE_X86
    if (plain_isa(isa) == Isa::avx512)
        return activations_avx512;
    if (plain_isa(isa) == Isa::avx2)
        return activations_avx2;
#endif
#if BITPALETTE_AARCH64
    if (isa == Isa::neon)
        return activations_neon;
#endif
    return activations_scalar;
}

void Activations::set(const void* x, Dtype dtype, int64_t tokens, int64_t in, const InputTransform* transform,
                      int threads) {
    if (transform != nullptr && transform->n() != in)
        throw std::invalid_argument("a transform of " + std::to_string(transform->n()) + " columns, an input of " +
                                    std::to_string(in));
    tokens_ = tokens, in_ = in, row_ = (in + row_columns - 1) / row_columns * row_columns;
    for (Quantized& q : quantized_)
        q.made = false;
    grow(room_, static_cast<size_t>(tokens * row_) + line / sizeof(float));
    void* start = room_.data();
    size_t bytes = room_.size() * sizeof(float);
    values_ = static_cast<float*>(std::align(line, static_cast<size_t>(tokens * row_) * sizeof(float), start, bytes));
    struct Call {
        const ActivationOps& ops;
        const InputTransform* transform;
        const char* x;
        Dtype dtype;
        int64_t tokens, in, row, shares;
        float* values;
        float* spare; // [shares, row]
    } call{activation_ops(isa_), transform, static_cast<const char*>(x), dtype, tokens, in, row_, 0, values_, nullptr};
    call.shares = useful_threads(tokens * in, tokens, threads);
    grow(spare_, static_cast<size_t>(call.shares * row_));
    call.spare = spare_.data();
    const auto body = [](void* context, int64_t begin, int64_t end) {
        const Call& c = *static_cast<const Call*>(context);
        const int64_t bytes_a_row = c.in * (c.dtype == Dtype::f32 ? 4 : 2);
        for (int64_t share = begin; share < end; ++share)
            for (int64_t t = c.tokens * share / c.shares; t < c.tokens * (share + 1) / c.shares; ++t) {
                float* to = c.values + t * c.row;
                if (c.transform != nullptr)
                    c.transform->apply(c.x + t * bytes_a_row, c.dtype, to, c.spare + share * c.row);
                else
                    c.ops.load(c.x + t * bytes_a_row, c.dtype, c.in, nullptr, to);
                std::fill(to + c.in, to + c.row, 0.0f);
            }
    };
    parallel_for(call.shares, static_cast<int>(call.shares), body, &call);
}

void Activations::need(InputForm form, int threads) {
    if (form == InputForm::f32)
        return;
    Quantized& q = quantized_[static_cast<size_t>(form)];
    if (q.made)
        return;
    const bool planes = form == InputForm::int16_by_256;
    const size_t size = static_cast<size_t>(tokens_ * row_);
    const int block = input_block(form);
    grow(q.codes, size);
    grow(q.low, planes ? size : 0);
    grow(q.scale, size / static_cast<size_t>(block));
    grow(q.sum, q.scale.size());
    struct Call {
        const ActivationOps& ops;
        const float* values;
        Quantized& q;
        int block;
        bool planes;
    } call{activation_ops(isa_), values_, q, block, planes};
    const auto body = [](void* context, int64_t begin, int64_t end) {
        const Call& c = *static_cast<const Call*>(context);
        const int64_t first = begin * c.block;
        c.ops.quantize(c.values + first, end - begin, c.block, c.q.codes.data() + first,
                       c.planes ? c.q.low.data() + first : nullptr, c.q.scale.data() + begin, c.q.sum.data() + begin);
    };
    parallel_for(tokens_ * row_ / block, useful_threads(tokens_ * row_, tokens_, threads), body, &call);
    q.made = true;
}

Int8Blocks Activations::int8(InputForm form) const {
    const Quantized& q = quantized_[static_cast<size_t>(form)];
    const int8_t* low = form == InputForm::int16_by_256 ? q.low.data() : nullptr;
    return {q.codes.data(), low, q.scale.data(), q.sum.data(), row_, input_block(form)};
}

} // namespace bitpalette
