#include "decoder_model.h"

#include <stdexcept>
#include <string>

namespace bitpalette {
namespace {

void check_size(const char* what, int64_t is, int64_t should_be) {
    if (is != should_be)
        throw std::invalid_argument(std::string("decoder: ") + what + " is " + std::to_string(is) + ", not " +
                                    std::to_string(should_be));
}

void check_norm(const char* what, const DecoderNorm& norm, int64_t size, bool needed) {
    if (needed || !norm.gain.empty())
        check_size(what, static_cast<int64_t>(norm.gain.size()), size);
}

void check_linear(const char* what, const DecoderLinear& linear, int64_t out, int64_t in) {
    if (linear.weight == nullptr)
        throw std::invalid_argument(std::string("decoder: ") + what + " is missing");
    check_size(what, linear.weight->out, out);
    check_size(what, linear.weight->in, in);
    if (linear.transform != nullptr)
        check_size(what, linear.transform->n(), in);
    if (!linear.bias.empty())
        check_size(what, static_cast<int64_t>(linear.bias.size()), out);
}

} // namespace

void DecoderModel::check() const {
    const DecoderSizes& s = sizes;
    if (s.hidden < 1 || s.kv_heads < 1 || s.heads < 1 || s.heads % s.kv_heads != 0 || s.head_dim < 1)
        throw std::invalid_argument("decoder: hidden size " + std::to_string(s.hidden) + ", " +
                                    std::to_string(s.heads) + " heads for " + std::to_string(s.kv_heads) +
                                    " of keys, head_dim " + std::to_string(s.head_dim));
    if (blocks.empty())
        throw std::invalid_argument("decoder: no blocks");
    for (const DecoderBlock& b : blocks) {
        check_norm("the gain before attention", b.before_attention, s.hidden, true);
        check_norm("the gain before the MLP", b.before_mlp, s.hidden, true);
        check_norm("the gain of queries", b.q_norm, s.head_dim, false);
        check_norm("the gain of keys", b.k_norm, s.head_dim, false);
        check_linear("q_proj", b.q, s.heads * s.head_dim, s.hidden);
        check_linear("k_proj", b.k, s.kv_heads * s.head_dim, s.hidden);
        check_linear("v_proj", b.v, s.kv_heads * s.head_dim, s.hidden);
        check_linear("o_proj", b.o, s.hidden, s.heads * s.head_dim);
        if (b.gate.weight == nullptr)
            throw std::invalid_argument("decoder: gate_proj is missing");
        check_linear("gate_proj", b.gate, b.gate.weight->out, s.hidden);
        check_linear("up_proj", b.up, b.gate.weight->out, s.hidden);
        check_linear("down_proj", b.down, s.hidden, b.gate.weight->out);
        if (b.window < 0)
            throw std::invalid_argument("decoder: a window of " + std::to_string(b.window) + " positions");
        if (b.rotary || !inverse_frequency.empty())
            check_size("twice the count of frequencies", 2 * static_cast<int64_t>(inverse_frequency.size()),
                       s.head_dim);
    }
    check_norm("the last gain", norm, s.hidden, true);
    if (norm_rotation != nullptr)
        check_size("the last rotation", norm_rotation->n(), s.hidden);
    if (head.weight == nullptr)
        throw std::invalid_argument("decoder: the head is missing");
    check_linear("the head", head, head.weight->out, s.hidden);
    if (embedding != nullptr) {
        check_size("the embedding's width", embedding->in, s.hidden);
        if (embedding_transform != nullptr)
            check_size("the embedding's transform", embedding_transform->n(), s.hidden);
    }
}

} // namespace bitpalette
