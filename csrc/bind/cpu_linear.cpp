// Weights, transforms of their inputs, and calls that share an input.
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "../cpu/input_transform.h"
#include "../cpu/linear.h"
#include "bind.h"

namespace py = pybind11;

namespace bitpalette {
namespace {

using Weights = std::vector<std::shared_ptr<LinearWeight>>;

// W float32 [out, in] as it is, in portable code, by any form of the input: what the interface means, for its tests and
// for measuring what a call costs beyond its arithmetic.
class ReferenceWeight final : public LinearWeight {
  public:
    ReferenceWeight(const float* w, int64_t out, int64_t in, InputForm form)
        : LinearWeight(out, in), w_(w), form_(form) {}

    InputForm form() const override { return form_; }
    int64_t bytes() const override { return out * in * static_cast<int64_t>(sizeof(float)); }

    void multiply(const Activations& x, float* y, int64_t y_row, int64_t begin, int64_t end) const override {
        for (int64_t t = 0; t < x.tokens(); ++t)
            for (int64_t r = begin * linear_block_rows; r < std::min(end * linear_block_rows, out); ++r) {
                float sum = 0;
                for (int64_t j = 0; j < in; ++j)
                    sum += w_[r * in + j] * value(x, t, j);
                y[t * y_row + r] = sum;
            }
    }

    void decode(const int64_t* index, int64_t begin, int64_t end, float* rows) const override {
        for (int64_t i = begin; i < end; ++i)
            std::copy(w_ + index[i] * in, w_ + (index[i] + 1) * in, rows + i * in);
    }

  private:
    float value(const Activations& x, int64_t t, int64_t j) const {
        if (form_ == InputForm::f32)
            return x.floats().values[t * x.floats().row + j];
        const Int8Blocks q = x.int8(form_);
        const int64_t i = t * q.row + j;
        const float low = q.low == nullptr ? 0.0f : static_cast<float>(q.low[i]) / 256;
        return (static_cast<float>(q.codes[i]) + low) * q.scale[i / q.block];
    }

    const float* w_;
    const InputForm form_;
};

// Weights that share an input, with what stays the same from call to call.
class LinearCall {
  public:
    LinearCall(Weights weights, Isa isa, std::shared_ptr<const InputTransform> transform)
        : weights_(std::move(weights)), isa_(isa), transform_(std::move(transform)) {
        if (weights_.empty())
            throw std::invalid_argument("linear: no weights");
        if (!isa_available(isa))
            throw std::invalid_argument(std::string("this machine has no ") + isa_name(isa));
    }

    size_t size() const { return weights_.size(); }

    // y[i] [tokens, out_i] = T(x) W_i^T + bias_i, all of dtype; bias 0: none.
    void run(const void* x, Dtype dtype, int64_t tokens, const uintptr_t* bias, const uintptr_t* y, int threads) const {
        const int64_t element = dtype == Dtype::f32 ? 4 : 2;
        int64_t first = 0;
        do {
            const int64_t n = std::min(tokens - first, most_tokens);
            run_some(static_cast<const char*>(x) + first * weights_[0]->in * element, dtype, n, bias, y, first,
                     threads);
            first += n;
        } while (first < tokens);
    }

  private:
    // What is kept between calls is bounded by as many tokens; unpacking a weight for each takes 2 % of their time.
    static constexpr int64_t most_tokens = 512;

    // Rows first..first+tokens-1 of y from as many of x.
    void run_some(const void* x, Dtype dtype, int64_t tokens, const uintptr_t* bias, const uintptr_t* y, int64_t first,
                  int threads) const {
        thread_local std::vector<std::unique_ptr<Activations>> inputs(isa_count); // kept between calls
        thread_local std::vector<float> room;
        thread_local std::vector<LinearOutput> outputs;
        std::unique_ptr<Activations>& input = inputs[static_cast<size_t>(isa_)];
        if (!input)
            input = std::make_unique<Activations>(isa_);
        input->set(x, dtype, tokens, weights_[0]->in, transform_.get(), threads);
        const bool direct = dtype == Dtype::f32;
        size_t columns = 0;
        for (const auto& w : weights_)
            columns += static_cast<size_t>(w->out);
        if (!direct && room.size() < columns * static_cast<size_t>(tokens))
            room.resize(columns * static_cast<size_t>(tokens));
        outputs.clear();
        float* next = room.data();
        const auto row_of = [&](size_t i) {
            return at<char>(y[i]) + first * weights_[i]->out * (dtype == Dtype::f32 ? 4 : 2);
        };
        for (size_t i = 0; i < size(); next += tokens * weights_[i]->out, ++i)
            outputs.push_back(
                {weights_[i].get(), direct ? reinterpret_cast<float*>(row_of(i)) : next, weights_[i]->out});
        linear_group(outputs.data(), static_cast<int>(size()), *input, threads);
        for (size_t i = 0; i < size(); ++i)
            if (!direct || bias[i] != 0)
                store_outputs(isa_, outputs[i].y, outputs[i].y_row, tokens, weights_[i]->out, at<const void>(bias[i]),
                              dtype, row_of(i));
    }

    Weights weights_;
    Isa isa_;
    std::shared_ptr<const InputTransform> transform_;
};

void run_group(const LinearCall& call, uintptr_t x, int dtype, int64_t tokens, const std::vector<uintptr_t>& bias,
               const std::vector<uintptr_t>& y, int threads) {
    if (bias.size() != call.size() || y.size() != call.size())
        throw std::invalid_argument("linear: as many biases and outputs as weights");
    const Dtype type = dtype_from_index(dtype);
    const py::gil_scoped_release unlocked;
    call.run(at<const void>(x), type, tokens, bias.data(), y.data(), threads);
}

} // namespace

void bind_linear(py::module_& m) {
    py::class_<InputTransform, std::shared_ptr<InputTransform>>(m, "InputTransform")
        .def(py::init([](int isa, int64_t n) { return std::make_shared<InputTransform>(isa_from_index(isa), n); }),
             py::arg("isa"), py::arg("n"))
        .def("add_multiply", [](InputTransform& t, uintptr_t factors) { t.add_multiply(at<const float>(factors)); })
        .def("add_rotate", &InputTransform::add_rotate)
        .def("add_gather", [](InputTransform& t, uintptr_t order) { t.add_gather(at<const int64_t>(order)); })
        .def(
            "apply",
            [](const InputTransform& t, uintptr_t x, uintptr_t y, int64_t tokens, int threads) {
                const py::gil_scoped_release unlocked;
                t.apply_rows(at<const float>(x), at<float>(y), tokens, threads);
            },
            "y [tokens, n] = T x for each row of x [tokens, n], both float32; x may be y.", py::arg("x"), py::arg("y"),
            py::arg("tokens"), py::arg("threads"));
    py::class_<Activations>(m, "Activations", "An input in the forms that kernels read, for looking at them.")
        .def(py::init([](int isa) { return Activations(isa_from_index(isa)); }), py::arg("isa"))
        .def(
            "set",
            [](Activations& a, uintptr_t x, int dtype, int64_t tokens, int64_t in, const InputTransform* transform,
               int threads) {
                const Dtype type = dtype_from_index(dtype);
                const py::gil_scoped_release unlocked;
                a.set(at<const void>(x), type, tokens, in, transform, threads);
            },
            py::arg("x"), py::arg("dtype"), py::arg("tokens"), py::arg("in_features"), py::arg("transform").none(true),
            py::arg("threads"))
        .def(
            "floats",
            [](const Activations& a, uintptr_t to) {
                const FloatInput f = a.floats();
                std::copy(f.values, f.values + a.tokens() * f.row, at<float>(to));
            },
            "Copies the values, float32 [tokens, in_features rounded up to 256].", py::arg("to"))
        .def(
            "quantized",
            [](Activations& a, int form, uintptr_t codes, uintptr_t low, uintptr_t scale, uintptr_t sum, int threads) {
                if (form < 1 || form > 3)
                    throw std::invalid_argument("no quantized form " + std::to_string(form));
                a.need(static_cast<InputForm>(form), threads);
                const Int8Blocks q = a.int8(static_cast<InputForm>(form));
                const int64_t n = a.tokens() * q.row;
                std::copy(q.codes, q.codes + n, at<int8_t>(codes));
                if (q.low != nullptr)
                    std::copy(q.low, q.low + n, at<int8_t>(low));
                std::copy(q.scale, q.scale + n / q.block, at<float>(scale));
                std::copy(q.sum, q.sum + n / q.block, at<int32_t>(sum));
            },
            "Copies codes and low (form 3) int8 [tokens, row], scale float32 and sum int32 [tokens, row / block] of "
            "form 1 (blocks of 32), 2 (256) or 3 (256, two planes).",
            py::arg("form"), py::arg("codes"), py::arg("low"), py::arg("scale"), py::arg("sum"), py::arg("threads"));
    m.def(
        "store_outputs",
        [](int isa, uintptr_t from, int64_t tokens, int64_t out, uintptr_t bias, int dtype, uintptr_t y) {
            store_outputs(isa_from_index(isa), at<const float>(from), out, tokens, out, at<const void>(bias),
                          dtype_from_index(dtype), at<void>(y));
        },
        "y [tokens, out] of dtype = float32 outputs + bias of dtype (0: none).", py::arg("isa"), py::arg("outputs"),
        py::arg("tokens"), py::arg("out"), py::arg("bias"), py::arg("dtype"), py::arg("y"));
    py::class_<LinearWeight, std::shared_ptr<LinearWeight>>(
        m, "LinearWeight", "A weight by the addresses of its tensors, which it does not own.")
        .def_readonly("out", &LinearWeight::out)
        .def_readonly("in_features", &LinearWeight::in)
        .def("rows", [](const LinearWeight& w, uintptr_t index, int64_t n, uintptr_t rows, int threads) {
            const py::gil_scoped_release unlocked;
            linear_rows(w, at<const int64_t>(index), n, at<float>(rows), threads);
        });
    py::class_<ReferenceWeight, LinearWeight, std::shared_ptr<ReferenceWeight>>(m, "ReferenceWeight")
        .def(py::init([](uintptr_t w, int64_t out, int64_t in, int form) {
                 if (form < 0 || form > 3)
                     throw std::invalid_argument("no form " + std::to_string(form));
                 return std::make_shared<ReferenceWeight>(at<const float>(w), out, in, static_cast<InputForm>(form));
             }),
             py::arg("w"), py::arg("out"), py::arg("in_features"), py::arg("form"));
    py::class_<LinearCall>(m, "LinearCall",
                           "Weights that share an input x [tokens, in] and its transform. Tensors come as addresses, "
                           "x, bias and y [tokens, out] of the same dtype; bias 0: none.")
        .def(py::init([](Weights weights, int isa, std::shared_ptr<InputTransform> transform) {
                 return LinearCall(std::move(weights), isa_from_index(isa), std::move(transform));
             }),
             py::arg("weights"), py::arg("isa"), py::arg("transform").none(true))
        .def(
            "run",
            [](const LinearCall& call, uintptr_t x, int dtype, int64_t tokens, uintptr_t bias, uintptr_t y,
               int threads) {
                const Dtype type = dtype_from_index(dtype);
                if (call.size() != 1)
                    throw std::invalid_argument("linear: " + std::to_string(call.size()) + " weights, one output");
                const py::gil_scoped_release unlocked;
                call.run(at<const void>(x), type, tokens, &bias, &y, threads);
            },
            "The only weight's output.", py::arg("x"), py::arg("dtype"), py::arg("tokens"), py::arg("bias"),
            py::arg("y"), py::arg("threads"))
        .def("run_group", run_group, "Every weight's output.", py::arg("x"), py::arg("dtype"), py::arg("tokens"),
             py::arg("bias"), py::arg("y"), py::arg("threads"));
    m.def(
        "linear",
        [](Weights weights, int isa, std::shared_ptr<InputTransform> transform, uintptr_t x, int dtype, int64_t tokens,
           const std::vector<uintptr_t>& bias, const std::vector<uintptr_t>& y, int threads) {
            const LinearCall call(std::move(weights), isa_from_index(isa), std::move(transform));
            run_group(call, x, dtype, tokens, bias, y, threads);
        },
        py::arg("weights"), py::arg("isa"), py::arg("transform").none(true), py::arg("x"), py::arg("dtype"),
        py::arg("tokens"), py::arg("bias"), py::arg("y"), py::arg("threads"));
}

} // namespace bitpalette
