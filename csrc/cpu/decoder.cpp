#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "half.h"

namespace bitpalette {
namespace {

constexpr int most_together = 3; // linears of one input: q, k and v

const DecoderModel& checked(const std::shared_ptr<const DecoderModel>& model) {
    if (model == nullptr)
        throw std::invalid_argument("decoder: no model");
    model->check();
    return *model;
}

size_t size(int64_t n) {
    return static_cast<size_t>(n);
}

} // namespace

Decoder::Decoder(Isa isa, std::shared_ptr<const DecoderModel> model, Dtype cache, int64_t capacity)
    : isa_(isa), model_(std::move(model)), math_(vector_math(isa)),
      cache_(static_cast<int64_t>(checked(model_).blocks.size()), model_->sizes.kv_heads, model_->sizes.head_dim, cache,
             capacity),
      input_(isa) {
    const DecoderSizes& s = model_->sizes;
    int64_t wide = 0;
    for (const DecoderBlock& b : model_->blocks)
        wide = std::max(wide, b.gate.weight->out);
    stream_.resize(size(most_tokens * s.hidden));
    normed_.resize(size(most_tokens * s.hidden));
    q_.resize(size(most_tokens * s.heads * s.head_dim));
    k_.resize(size(most_tokens * s.kv_heads * s.head_dim));
    v_.resize(size(most_tokens * s.kv_heads * s.head_dim));
    heads_.resize(size(most_tokens * s.heads * cache_.row())); // zero from head_dim on, always
    sums_.resize(heads_.size());
    softmax_.resize(size(most_tokens * s.heads * 2));
    gate_.resize(size(most_tokens * wide));
    up_.resize(size(most_tokens * wide));
    cosine_.resize(size(most_tokens * s.head_dim / 2));
    sine_.resize(cosine_.size());
}

void Decoder::step(const int64_t* tokens, int64_t n, int64_t first, float* logits, int64_t kept, int threads) {
    check_step(n, first, kept);
    if (model_->embedding == nullptr)
        throw std::invalid_argument("decoder: it has no embedding; step_rows takes rows");
    linear_rows(*model_->embedding, tokens, n, stream_.data(), 1);
    if (model_->embedding_transform != nullptr)
        model_->embedding_transform->apply_rows(stream_.data(), stream_.data(), n, threads);
    run(n, first, logits, kept, threads);
}

void Decoder::step_rows(const float* rows, int64_t n, int64_t first, float* logits, int64_t kept, int threads) {
    check_step(n, first, kept);
    std::copy(rows, rows + n * model_->sizes.hidden, stream_.begin());
    run(n, first, logits, kept, threads);
}

void Decoder::fill(int64_t layer, const void* keys, const void* values, Dtype dtype, int64_t n) {
    const DecoderSizes& s = model_->sizes;
    if (layer < 0 || layer >= static_cast<int64_t>(model_->blocks.size()) || n < 0)
        throw std::invalid_argument("decoder: " + std::to_string(n) + " positions of layer " + std::to_string(layer));
    cache_.reserve(n);
    for (int64_t head = 0; head < s.kv_heads; ++head)
        for (int64_t p = 0; p < n; ++p) {
            for (int64_t i = 0; i < s.head_dim; ++i) {
                k_[size(i)] = load_element(keys, dtype, (head * n + p) * s.head_dim + i);
                v_[size(i)] = load_element(values, dtype, (head * n + p) * s.head_dim + i);
            }
            cache_.put(layer, head, p, k_.data(), v_.data());
        }
    length_ = n;
}

void Decoder::check_step(int64_t n, int64_t first, int64_t kept) const {
    if (n < 1 || n > most_tokens)
        throw std::invalid_argument("decoder: a step of " + std::to_string(n) + " tokens, not 1 to " +
                                    std::to_string(most_tokens));
    if (kept < 0 || kept > n)
        throw std::invalid_argument("decoder: logits of " + std::to_string(kept) + " of " + std::to_string(n) +
                                    " tokens");
    if (first < 0 || first > length_)
        throw std::invalid_argument("decoder: position " + std::to_string(first) + ", " + std::to_string(length_) +
                                    " are held");
}

// stream_ holds the embeddings.
void Decoder::run(int64_t n, int64_t first, float* logits, int64_t kept, int threads) {
    const DecoderModel& m = *model_;
    const int64_t hidden = m.sizes.hidden;
    cache_.reserve(first + n);
    length_ = first; // what an error leaves behind is not counted
    set_angles(n, first);
    for (size_t layer = 0; layer < m.blocks.size(); ++layer) {
        const DecoderBlock& block = m.blocks[layer];
        norm(block.before_attention, stream_.data(), n);
        attention(static_cast<int64_t>(layer), n, first, threads);
        norm(block.before_mlp, stream_.data(), n);
        mlp(block, n, threads);
    }
    length_ = first + n;
    if (kept == 0)
        return;
    float* last = stream_.data() + (n - kept) * hidden;
    const auto rotate = [&](float* x) {
        if (m.norm_rotation != nullptr)
            m.norm_rotation->apply_rows(x, x, kept, threads);
    };
    rotate(last);
    norm(m.norm, last, kept);
    rotate(normed_.data());
    const DecoderLinear* head = &m.head;
    multiply(normed_.data(), hidden, kept, &head, &logits, 1, threads);
}

// normed_ to stream_ += attention
void Decoder::attention(int64_t layer, int64_t n, int64_t first, int threads) {
    const DecoderSizes& s = model_->sizes;
    const DecoderBlock& b = model_->blocks[size(layer)];
    const DecoderLinear* linears[] = {&b.q, &b.k, &b.v};
    float* outputs[] = {q_.data(), k_.data(), v_.data()};
    multiply(normed_.data(), s.hidden, n, linears, outputs, 3, threads);
    const int64_t half = s.head_dim / 2, row = cache_.row();
    const auto finish = [&](float* x, int64_t t, const DecoderNorm& by) {
        if (!by.gain.empty())
            math_.rms_norm(x, by.gain.data(), by.eps, s.head_dim, x);
        if (b.rotary)
            math_.turn(x, cosine_.data() + t * half, sine_.data() + t * half, half);
    };
    for (int64_t t = 0; t < n; ++t) {
        for (int64_t h = 0; h < s.kv_heads; ++h) {
            const int64_t at = (t * s.kv_heads + h) * s.head_dim;
            finish(k_.data() + at, t, b.k_norm);
            cache_.put(layer, h, first + t, k_.data() + at, v_.data() + at);
        }
        for (int64_t h = 0; h < s.heads; ++h) {
            float* x = q_.data() + (t * s.heads + h) * s.head_dim;
            finish(x, t, b.q_norm);
            std::copy(x, x + s.head_dim, heads_.data() + (t * s.heads + h) * row);
        }
    }
    AttentionCall call{};
    call.keys = cache_.keys(layer), call.values = cache_.values(layer);
    call.dtype = cache_.dtype(), call.stride = cache_.capacity() * row, call.row = row;
    call.heads = s.heads, call.kv_heads = s.kv_heads, call.head_dim = s.head_dim;
    call.first = first, call.tokens = n, call.window = b.window, call.scale = s.score_scale;
    call.q = heads_.data(), call.sums = sums_.data(), call.softmax = softmax_.data(), call.out = q_.data();
    attend(isa_, call, threads);
    const DecoderLinear* o = &b.o;
    float* y = normed_.data();
    multiply(q_.data(), s.heads * s.head_dim, n, &o, &y, 1, threads);
    math_.add(y, n * s.hidden, stream_.data());
}

// normed_ to stream_ += MLP
void Decoder::mlp(const DecoderBlock& b, int64_t n, int threads) {
    const int64_t hidden = model_->sizes.hidden, wide = b.gate.weight->out;
    const DecoderLinear* linears[] = {&b.gate, &b.up};
    float* outputs[] = {gate_.data(), up_.data()};
    multiply(normed_.data(), hidden, n, linears, outputs, 2, threads);
    const auto gated = model_->sizes.gate == Gate::silu ? math_.silu_multiply : math_.gelu_tanh_multiply;
    gated(gate_.data(), up_.data(), n * wide);
    const DecoderLinear* down = &b.down;
    float* y = normed_.data();
    multiply(gate_.data(), wide, n, &down, &y, 1, threads);
    math_.add(y, n * hidden, stream_.data());
}

void Decoder::norm(const DecoderNorm& by, const float* x, int64_t n) {
    const int64_t hidden = model_->sizes.hidden;
    for (int64_t t = 0; t < n; ++t)
        math_.rms_norm(x + t * hidden, by.gain.data(), by.eps, hidden, normed_.data() + t * hidden);
}

// y[i] [n, out_i] of linears that read x [n, in]; those with the same transform share one input and one parallel
// region.
void Decoder::multiply(const float* x, int64_t in, int64_t n, const DecoderLinear* const* linears, float* const* y,
                       int count, int threads) {
    bool done[most_together] = {};
    for (int i = 0; i < count; ++i) {
        if (done[i])
            continue;
        LinearOutput outputs[most_together];
        int together = 0;
        for (int j = i; j < count; ++j)
            if (!done[j] && linears[j]->transform == linears[i]->transform) {
                outputs[together++] = {linears[j]->weight.get(), y[j], linears[j]->weight->out};
                done[j] = true;
            }
        input_.set(x, Dtype::f32, n, in, linears[i]->transform.get());
        linear_group(outputs, together, input_, threads);
    }
    for (int i = 0; i < count; ++i)
        if (!linears[i]->bias.empty()) {
            const int64_t out = linears[i]->weight->out;
            for (int64_t t = 0; t < n; ++t)
                math_.add(linears[i]->bias.data(), out, y[i] + t * out);
        }
}

// As transformers does it: the angle is a product in float32. Its cosine is taken in double, hence rounded once.
void Decoder::set_angles(int64_t n, int64_t first) {
    const std::vector<float>& frequency = model_->inverse_frequency;
    for (int64_t t = 0; t < n; ++t)
        for (size_t i = 0; i < frequency.size(); ++i) {
            const double angle = static_cast<float>(first + t) * frequency[i];
            const size_t at = size(t) * frequency.size() + i;
            cosine_[at] = static_cast<float>(std::cos(angle)) * model_->rotary_scale;
            sine_[at] = static_cast<float>(std::sin(angle)) * model_->rotary_scale;
        }
}

} // namespace bitpalette
