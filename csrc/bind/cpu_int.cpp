// Kernels of codec `int`.
#include "../cpu/int4.h"
#include "../cpu/int8.h"
#include "bind.h"

namespace py = pybind11;

namespace bitpalette {
namespace {

// A packed weight with its instruction set: made once a layer, so that a call passes six numbers and not a dozen.
struct Int4Layer {
    Isa isa;
    Int4Weight weight;
};

Int4Layer int4_layer(int isa, uintptr_t codes, uintptr_t scale, uintptr_t zero, int64_t out, int64_t in,
                     int64_t group_size) {
    const Int4Layer layer{
        isa_from_index(isa),
        {at<const uint8_t>(codes), at<const uint16_t>(scale), at<const uint8_t>(zero), out, in, group_size}};
    int4_check(layer.isa, layer.weight);
    return layer;
}

} // namespace

void bind_int(py::module_& m) {
    py::class_<Int4Layer>(m, "Int4Layer", "A packed weight by the addresses of its tensors, which it does not own.")
        .def(py::init(&int4_layer), py::arg("isa"), py::arg("codes"), py::arg("scale"), py::arg("zero"), py::arg("out"),
             py::arg("in_features"), py::arg("group_size"))
        .def("linear",
             [](const Int4Layer& layer, uintptr_t x, uintptr_t bias, uintptr_t y, int dtype, int64_t tokens,
                int threads) {
                 const Dtype activations = dtype_from_index(dtype);
                 const py::gil_scoped_release unlocked;
                 int4_linear(layer.isa, layer.weight, at<const void>(x), at<const void>(bias), at<void>(y), activations,
                             tokens, threads);
             })
        .def("rows", [](const Int4Layer& layer, uintptr_t index, int64_t n, uintptr_t rows, int threads) {
            const py::gil_scoped_release unlocked;
            int4_rows(layer.isa, layer.weight, at<const int64_t>(index), n, at<float>(rows), threads);
        });
    m.def(
        "int8_linear",
        [](int isa, uintptr_t codes, uintptr_t scale, int64_t out, int64_t in, uintptr_t x, int64_t tokens, uintptr_t y,
           int threads) {
            const py::gil_scoped_release unlocked;
            int8_linear(isa_from_index(isa), {at<const uint8_t>(codes), at<const float>(scale), out, in},
                        at<const float>(x), tokens, at<float>(y), threads);
        },
        py::arg("isa"), py::arg("codes"), py::arg("scale"), py::arg("out"), py::arg("in_features"), py::arg("x"),
        py::arg("tokens"), py::arg("y"), py::arg("threads"));
}

} // namespace bitpalette
