// A Llama-like decoder as native code sees it: weights, norms and sizes. It never changes once it is built, so several
// decoders may run from one.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "input_transform.h"
#include "linear.h"

namespace bitpalette {

// y = T(x) W^T + bias.
struct DecoderLinear {
    std::shared_ptr<LinearWeight> weight;
    std::shared_ptr<InputTransform> transform; // null: none. Linears of one input share its work by sharing the object
    std::vector<float> bias;                   // [out], or empty
};

// y = x * gain / sqrt(mean(x^2) + eps); no gain: no norm.
struct DecoderNorm {
    std::vector<float> gain;
    float eps = 0;
};

struct DecoderBlock {
    DecoderNorm before_attention, before_mlp; // [hidden]
    DecoderNorm q_norm, k_norm;               // [head_dim], of each head before the rotary embedding
    DecoderLinear q, k, v, o, gate, up, down;
    bool rotary = true;
    int64_t window = 0; // positions that a token sees, its own among them; 0: all
};

enum class Gate { silu = 0, gelu_tanh = 1 };

struct DecoderSizes {
    int64_t hidden, heads, kv_heads, head_dim;
    float score_scale; // of q . k
    Gate gate;
};

struct DecoderModel {
    DecoderSizes sizes;
    std::vector<float> inverse_frequency; // [head_dim / 2]
    float rotary_scale = 1;               // of cosines and sines
    std::vector<DecoderBlock> blocks;
    std::shared_ptr<LinearWeight> embedding;             // [vocabulary, hidden]; null: rows come from the caller
    std::shared_ptr<InputTransform> embedding_transform; // of the rows it gives; null: none
    DecoderNorm norm;                                    // before the head
    std::shared_ptr<InputTransform> norm_rotation;       // y = R norm(R x); null: none
    DecoderLinear head;

    // std::invalid_argument, with both sizes, for parts that do not fit each other.
    void check() const;
};

} // namespace bitpalette
