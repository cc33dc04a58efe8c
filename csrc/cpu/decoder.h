// A decode step of a Llama-like model as one call: the model, the keys and values of one sequence, and nothing of
// Python. Vectors between layers are float32: logits are those of the float32 model up to rounding, and closer to them
// than a bfloat16 model's.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "activations.h"
#include "attention_decode.h"
#include "decoder_model.h"
#include "kv_cache.h"
#include "vector_math.h"

namespace bitpalette {

// Of one sequence; calls come from one thread at a time.
class Decoder {
  public:
    static constexpr int64_t most_tokens = 8; // of one step; prompts beyond it are for the wide kernels

    // cache: f32 or bf16. capacity: positions to make room for; more may come. std::invalid_argument for a model whose
    // parts do not fit, or a missing instruction set.
    Decoder(Isa isa, std::shared_ptr<const DecoderModel> model, Dtype cache, int64_t capacity);

    // Tokens at positions first..first+n-1, and logits [kept, vocabulary] of the last `kept` of them. Positions from
    // first + n on are forgotten, so a rejected draft is undone by stepping from where it began. std::invalid_argument
    // for a token outside the embedding, n outside 1..most_tokens, kept > n, or first beyond `length()`.
    void step(const int64_t* tokens, int64_t n, int64_t first, float* logits, int64_t kept, int threads);
    // The same for rows [n, hidden] of an embedding that is not the model's.
    void step_rows(const float* rows, int64_t n, int64_t first, float* logits, int64_t kept, int threads);

    // Keys and values of positions 0..n-1 of a layer from [kv_heads, n, head_dim], after the rotary embedding, as a
    // prompt's forward pass elsewhere left them. Once every layer is filled the decoder goes on from there.
    void fill(int64_t layer, const void* keys, const void* values, Dtype dtype, int64_t n);

    int64_t length() const { return length_; } // positions that are held
    int64_t vocabulary() const { return model_->head.weight->out; }
    const DecoderModel& model() const { return *model_; }

  private:
    void check_step(int64_t n, int64_t first, int64_t kept) const;
    void run(int64_t n, int64_t first, float* logits, int64_t kept, int threads);
    void attention(int64_t layer, int64_t n, int64_t first, int threads);
    void mlp(const DecoderBlock& block, int64_t n, int threads);
    void norm(const DecoderNorm& by, const float* x, int64_t n);
    void multiply(const float* x, int64_t in, int64_t n, const DecoderLinear* const* linears, float* const* y,
                  int count, int threads);
    void set_angles(int64_t n, int64_t first);

    Isa isa_;
    std::shared_ptr<const DecoderModel> model_;
    const VectorMath& math_;
    KvCache cache_;
    int64_t length_ = 0;
    Activations input_;
    // [tokens, ...] of one step
    std::vector<float> stream_, normed_, q_, k_, v_, heads_, sums_, softmax_, gate_, up_, cosine_, sine_;
};

} // namespace bitpalette
