// A decoder, and the weights that a plan leaves unquantized.
#include <pybind11/stl.h>

#include <memory>
#include <vector>

#include "../cpu/decoder.h"
#include "../cpu/dense_weight.h"
#include "bind.h"

namespace py = pybind11;

namespace bitpalette {
namespace {

using Linears = std::vector<DecoderLinear>;

DecoderLinear decoder_linear(std::shared_ptr<LinearWeight> weight, std::shared_ptr<InputTransform> transform,
                             uintptr_t bias) {
    DecoderLinear linear{std::move(weight), std::move(transform), {}};
    if (bias != 0)
        linear.bias.assign(at<const float>(bias), at<const float>(bias) + linear.weight->out);
    return linear;
}

void add_block(DecoderModel& model, const DecoderNorm& before_attention, const DecoderNorm& before_mlp,
               const DecoderNorm* q_norm, const DecoderNorm* k_norm, const Linears& linears, bool rotary,
               int64_t window) {
    if (linears.size() != 7)
        throw std::invalid_argument("decoder: a block has 7 linears, not " + std::to_string(linears.size()));
    model.blocks.push_back({before_attention, before_mlp, q_norm == nullptr ? DecoderNorm{} : *q_norm,
                            k_norm == nullptr ? DecoderNorm{} : *k_norm, linears[0], linears[1], linears[2], linears[3],
                            linears[4], linears[5], linears[6], rotary, window});
}

std::shared_ptr<DecoderModel> decoder_model(int64_t hidden, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                            float score_scale, int gate, std::vector<float> inverse_frequency,
                                            float rotary_scale) {
    if (gate != static_cast<int>(Gate::silu) && gate != static_cast<int>(Gate::gelu_tanh))
        throw std::invalid_argument("decoder: no gate " + std::to_string(gate));
    auto model = std::make_shared<DecoderModel>();
    model->sizes = {hidden, heads, kv_heads, head_dim, score_scale, static_cast<Gate>(gate)};
    model->inverse_frequency = std::move(inverse_frequency);
    model->rotary_scale = rotary_scale;
    return model;
}

} // namespace

void bind_decoder(py::module_& m) {
    py::class_<DenseWeight, LinearWeight, std::shared_ptr<DenseWeight>>(
        m, "DenseWeight", "An unquantized weight [out, in] by the address of its tensor, which it does not own.")
        .def(py::init([](int isa, uintptr_t values, int dtype, int64_t out, int64_t in) {
                 return std::make_shared<DenseWeight>(isa_from_index(isa), at<const void>(values),
                                                      dtype_from_index(dtype), out, in);
             }),
             py::arg("isa"), py::arg("values"), py::arg("dtype"), py::arg("out"), py::arg("in_features"));
    py::class_<DecoderLinear>(m, "DecoderLinear")
        .def(py::init(&decoder_linear), py::arg("weight").none(false), py::arg("transform").none(true),
             py::arg("bias"));
    py::class_<DecoderNorm>(m, "DecoderNorm")
        .def(py::init([](uintptr_t gain, int64_t n, float eps) {
                 return DecoderNorm{{at<const float>(gain), at<const float>(gain) + n}, eps};
             }),
             py::arg("gain"), py::arg("n"), py::arg("eps"));
    py::class_<DecoderModel, std::shared_ptr<DecoderModel>>(
        m, "DecoderModel", "A Llama-like model; build it whole before a Decoder runs it. Biases and gains are copied.")
        .def(py::init(&decoder_model), py::arg("hidden"), py::arg("heads"), py::arg("kv_heads"), py::arg("head_dim"),
             py::arg("score_scale"), py::arg("gate"), py::arg("inverse_frequency"), py::arg("rotary_scale"))
        .def("add_block", &add_block, py::arg("before_attention"), py::arg("before_mlp"), py::arg("q_norm").none(true),
             py::arg("k_norm").none(true), py::arg("linears"), py::arg("rotary"), py::arg("window"))
        .def(
            "set_embedding",
            [](DecoderModel& model, std::shared_ptr<LinearWeight> weight, std::shared_ptr<InputTransform> transform) {
                model.embedding = std::move(weight);
                model.embedding_transform = std::move(transform);
            },
            py::arg("weight"), py::arg("transform").none(true))
        .def(
            "set_head",
            [](DecoderModel& model, const DecoderNorm& norm, std::shared_ptr<InputTransform> rotation,
               const DecoderLinear& head) {
                model.norm = norm;
                model.norm_rotation = std::move(rotation);
                model.head = head;
            },
            py::arg("norm"), py::arg("rotation").none(true), py::arg("head"));
    // its calls leave the GIL, so one decoder must not be called from two threads at a time
    py::class_<Decoder>(m, "Decoder")
        .def(py::init([](int isa, const std::shared_ptr<DecoderModel>& model, int cache, int64_t capacity) {
                 // a copy: what is added to the model later does not reach a decoder that has checked it
                 return std::make_unique<Decoder>(isa_from_index(isa), std::make_shared<const DecoderModel>(*model),
                                                  dtype_from_index(cache), capacity);
             }),
             py::arg("isa"), py::arg("model").none(false), py::arg("cache"), py::arg("capacity"))
        .def_readonly_static("most_tokens", &Decoder::most_tokens)
        .def_property_readonly("length", &Decoder::length)
        .def_property_readonly("vocabulary", &Decoder::vocabulary)
        .def(
            "step",
            [](Decoder& decoder, uintptr_t tokens, int64_t n, int64_t first, uintptr_t logits, int64_t kept,
               int threads) {
                const py::gil_scoped_release unlocked;
                decoder.step(at<const int64_t>(tokens), n, first, at<float>(logits), kept, threads);
            },
            py::arg("tokens"), py::arg("n"), py::arg("first"), py::arg("logits"), py::arg("kept"), py::arg("threads"))
        .def(
            "step_rows",
            [](Decoder& decoder, uintptr_t rows, int64_t n, int64_t first, uintptr_t logits, int64_t kept,
               int threads) {
                const py::gil_scoped_release unlocked;
                decoder.step_rows(at<const float>(rows), n, first, at<float>(logits), kept, threads);
            },
            py::arg("rows"), py::arg("n"), py::arg("first"), py::arg("logits"), py::arg("kept"), py::arg("threads"))
        .def(
            "fill",
            [](Decoder& decoder, int64_t layer, uintptr_t keys, uintptr_t values, int dtype, int64_t n) {
                const Dtype type = dtype_from_index(dtype);
                const py::gil_scoped_release unlocked;
                decoder.fill(layer, at<const void>(keys), at<const void>(values), type, n);
            },
            py::arg("layer"), py::arg("keys"), py::arg("values"), py::arg("dtype"), py::arg("n"));
}

} // namespace bitpalette
