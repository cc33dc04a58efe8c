// Weights, transforms of their inputs, and calls that share an input.
#include <pybind11/stl.h>

#include <memory>
#include <vector>

#include "../cpu/input_transform.h"
#include "../cpu/linear.h"
#include "bind.h"

namespace py = pybind11;

namespace bitpalette {
namespace {

using Weights = std::vector<std::shared_ptr<LinearWeight>>;

// y[i] [tokens, out_i] = T(x) W_i^T + bias_i for weights that share the input x [tokens, in]; bias 0: none.
void linear(const Weights& weights, Isa isa, const InputTransform* transform, const void* x, Dtype dtype,
            int64_t tokens, const std::vector<uintptr_t>& bias, const std::vector<uintptr_t>& y, int threads) {
    if (bias.size() != weights.size() || y.size() != weights.size())
        throw std::invalid_argument("linear: as many biases and outputs as weights");
    if (weights.empty())
        return;
    thread_local std::vector<std::unique_ptr<Activations>> inputs(isa_count); // kept between calls
    std::unique_ptr<Activations>& input = inputs[static_cast<size_t>(isa)];
    if (!input)
        input = std::make_unique<Activations>(isa);
    input->set(x, dtype, tokens, weights[0]->in, transform);
    thread_local std::vector<float> room;
    int64_t columns = 0;
    for (const auto& w : weights)
        columns += w->out;
    const bool direct = dtype == Dtype::f32;
    if (!direct)
        room.resize(static_cast<size_t>(tokens * columns));
    std::vector<LinearOutput> outputs;
    int64_t first = 0;
    for (size_t i = 0; i < weights.size(); ++i) {
        outputs.push_back({weights[i].get(), direct ? at<float>(y[i]) : room.data() + tokens * first, weights[i]->out});
        first += weights[i]->out;
    }
    linear_group(outputs.data(), static_cast<int>(outputs.size()), *input, threads);
    for (size_t i = 0; i < weights.size(); ++i)
        if (!direct || bias[i] != 0)
            store_outputs(outputs[i].y, outputs[i].y_row, tokens, weights[i]->out, at<const void>(bias[i]), dtype,
                          at<void>(y[i]));
}

} // namespace

void bind_linear(py::module_& m) {
    py::class_<InputTransform, std::shared_ptr<InputTransform>>(m, "InputTransform")
        .def(py::init([](int isa, int64_t n) { return std::make_shared<InputTransform>(isa_from_index(isa), n); }),
             py::arg("isa"), py::arg("n"))
        .def("add_multiply", [](InputTransform& t, uintptr_t factors) { t.add_multiply(at<const float>(factors)); })
        .def("add_rotate", &InputTransform::add_rotate)
        .def("add_gather", [](InputTransform& t, uintptr_t order) { t.add_gather(at<const int64_t>(order)); })
        .def("apply", [](const InputTransform& t, uintptr_t x, int64_t tokens) {
            const py::gil_scoped_release unlocked;
            std::vector<float> room(static_cast<size_t>(t.n()));
            for (int64_t i = 0; i < tokens; ++i)
                t.apply(at<float>(x) + i * t.n(), room.data());
        });
    py::class_<LinearWeight, std::shared_ptr<LinearWeight>>(
        m, "LinearWeight", "A weight by the addresses of its tensors, which it does not own.")
        .def_readonly("out", &LinearWeight::out)
        .def_readonly("in_features", &LinearWeight::in)
        .def("rows", [](const LinearWeight& w, uintptr_t index, int64_t n, uintptr_t rows, int threads) {
            const py::gil_scoped_release unlocked;
            linear_rows(w, at<const int64_t>(index), n, at<float>(rows), threads);
        });
    m.def(
        "linear",
        [](const Weights& weights, int isa, const InputTransform* transform, uintptr_t x, int dtype, int64_t tokens,
           const std::vector<uintptr_t>& bias, const std::vector<uintptr_t>& y, int threads) {
            const Isa set = isa_from_index(isa);
            const Dtype type = dtype_from_index(dtype);
            const py::gil_scoped_release unlocked;
            linear(weights, set, transform, at<const void>(x), type, tokens, bias, y, threads);
        },
        py::arg("weights"), py::arg("isa"), py::arg("transform").none(true), py::arg("x"), py::arg("dtype"),
        py::arg("tokens"), py::arg("bias"), py::arg("y"), py::arg("threads"));
}

} // namespace bitpalette
