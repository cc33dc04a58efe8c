// Decoders of awkward sizes with weights in blocks of exactly their size, for a build with sanitizers.
#include <cmath>
#include <cstdio>
#include <memory>
#include <vector>

#include "cpu/decoder.h"
#include "cpu/dense_weight.h"

using namespace bitpalette;

namespace {

struct Values {
    std::vector<std::unique_ptr<unsigned char[]>> kept;
    uint32_t state = 1;

    float next() {
        state = state * 1664525 + 1013904223;
        return static_cast<float>(state >> 8) / (1 << 24) - 0.5f;
    }
    std::vector<float> floats(int64_t n) {
        std::vector<float> x(static_cast<size_t>(n));
        for (float& f : x)
            f = next();
        return x;
    }
    // what the element type makes of the upper bytes of a float32 does not matter, as long as it is finite
    DecoderLinear linear(Isa isa, Dtype dtype, int64_t out, int64_t in, bool bias) {
        const size_t element = dtype == Dtype::f32 ? 4 : 2, n = static_cast<size_t>(out * in);
        kept.push_back(std::make_unique<unsigned char[]>(n * element));
        for (size_t i = 0; i < n; ++i) {
            const float value = next();
            const auto* bytes = reinterpret_cast<const unsigned char*>(&value);
            for (size_t b = 0; b < element; ++b)
                kept.back()[i * element + b] = bytes[4 - element + b];
        }
        return {std::make_shared<DenseWeight>(isa, kept.back().get(), dtype, out, in), nullptr,
                bias ? floats(out) : std::vector<float>{}};
    }
};

bool run(Isa isa, Dtype dtype, Dtype cache, int64_t hidden, int64_t wide, int64_t heads, int64_t kv, int64_t dim) {
    Values v;
    auto model = std::make_shared<DecoderModel>();
    model->sizes = {hidden, heads, kv, dim, 0.3f, wide % 2 == 0 ? Gate::silu : Gate::gelu_tanh};
    model->inverse_frequency = v.floats(dim / 2);
    for (int layer = 0; layer < 2; ++layer) {
        DecoderBlock b;
        b.before_attention = {v.floats(hidden), 1e-5f}, b.before_mlp = {v.floats(hidden), 1e-5f};
        if (layer == 1)
            b.q_norm = {v.floats(dim), 1e-5f}, b.k_norm = {v.floats(dim), 1e-5f}, b.window = 5;
        b.q = v.linear(isa, dtype, heads * dim, hidden, true), b.k = v.linear(isa, dtype, kv * dim, hidden, true);
        b.v = v.linear(isa, dtype, kv * dim, hidden, false), b.o = v.linear(isa, dtype, hidden, heads * dim, false);
        b.gate = v.linear(isa, dtype, wide, hidden, false), b.up = v.linear(isa, dtype, wide, hidden, true);
        b.down = v.linear(isa, dtype, hidden, wide, false);
        b.rotary = layer == 0;
        model->blocks.push_back(std::move(b));
    }
    const int64_t vocabulary = 37;
    model->embedding = v.linear(isa, dtype, vocabulary, hidden, false).weight;
    auto rotation = std::make_shared<InputTransform>(isa, hidden);
    rotation->add_rotate();
    model->embedding_transform = model->norm_rotation = rotation;
    model->norm = {v.floats(hidden), 1e-5f};
    model->head = v.linear(isa, dtype, vocabulary, hidden, false);
    model->head.transform = rotation;
    Decoder decoder(isa, model, cache, 1);
    const std::unique_ptr<float[]> logits(new float[static_cast<size_t>(8 * vocabulary)]);
    int64_t at = 0;
    bool finite = true;
    for (int64_t n = 1; at < 40; at += n, n = n % 8 + 1) {
        std::vector<int64_t> tokens(static_cast<size_t>(n), at % vocabulary);
        decoder.step(tokens.data(), n, at, logits.get(), n, 1);
        for (int64_t i = 0; i < n * vocabulary; ++i)
            finite = finite && std::isfinite(logits[static_cast<size_t>(i)]);
    }
    const std::vector<float> kept = v.floats(kv * 3 * dim);
    Decoder other(isa, model, cache, 1);
    for (int64_t layer = 0; layer < 2; ++layer)
        other.fill(layer, kept.data(), kept.data(), Dtype::f32, 3);
    const std::vector<float> row = v.floats(hidden);
    other.step_rows(row.data(), 1, 3, logits.get(), 1, 1);
    return finite && std::isfinite(logits[0]);
}

} // namespace

int main() {
    for (int i = 0; i < isa_count; ++i) {
        const Isa isa = static_cast<Isa>(i);
        if (!isa_available(isa))
            continue;
        for (const Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16})
            for (const Dtype cache : {Dtype::f32, Dtype::bf16})
                if (!run(isa, dtype, cache, 37, 53, 5, 5, 6) || !run(isa, dtype, cache, 96, 64, 4, 2, 34) ||
                    !run(isa, dtype, cache, 48, 50, 3, 1, 260)) {
                    std::printf("%s: logits are not finite\n", isa_name(isa));
                    return 1;
                }
    }
    std::printf("clean\n");
    return 0;
}
