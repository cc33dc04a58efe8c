// Kernels of codec `trellis`.
#include "../cpu/trellis_decode.h"
#include "../cpu/trellis_linear.h"
#include "bind.h"

namespace py = pybind11;

namespace bitpalette {

void bind_trellis(py::module_& m) {
    m.def(
        "trellis_decode",
        [](int isa, uintptr_t codes, uintptr_t scale, int64_t out, int64_t in, int row_bits, int window,
           uintptr_t index, int64_t n, uintptr_t y, int threads) {
            const py::gil_scoped_release unlocked;
            trellis_decode(isa_from_index(isa),
                           {at<const uint8_t>(codes), at<const float>(scale), out, in, {row_bits, window}},
                           at<const int64_t>(index), n, at<float>(y), threads);
        },
        py::arg("isa"), py::arg("codes"), py::arg("scale"), py::arg("out"), py::arg("in_features"), py::arg("m"),
        py::arg("window"), py::arg("index"), py::arg("n"), py::arg("y"), py::arg("threads"));
    m.def(
        "trellis_linear",
        [](int isa, uintptr_t codes, uintptr_t scale, int64_t out, int64_t in, int row_bits, int window, uintptr_t x,
           int64_t tokens, uintptr_t y, int threads) {
            const py::gil_scoped_release unlocked;
            trellis_linear(isa_from_index(isa),
                           {at<const uint8_t>(codes), at<const float>(scale), out, in, {row_bits, window}},
                           at<const float>(x), tokens, at<float>(y), threads);
        },
        py::arg("isa"), py::arg("codes"), py::arg("scale"), py::arg("out"), py::arg("in_features"), py::arg("m"),
        py::arg("window"), py::arg("x"), py::arg("tokens"), py::arg("y"), py::arg("threads"));
}

} // namespace bitpalette
