// Kernels of codec `trellis`.
#include <memory>

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
        "trellis_weight",
        [](int isa, int form, uintptr_t codes, uintptr_t scale, int64_t out, int64_t in, int row_bits,
           int window) -> std::shared_ptr<LinearWeight> {
            return std::make_shared<TrellisLinear>(isa_from_index(isa), input_form_from_index(form),
                                                   at<const uint8_t>(codes), at<const uint16_t>(scale), out, in,
                                                   TrellisCode{row_bits, window});
        },
        "A LinearWeight over codes by address; scales, fp16, are copied. form: of inputs, as in "
        "csrc/cpu/activations.h.",
        py::arg("isa"), py::arg("form"), py::arg("codes"), py::arg("scale"), py::arg("out"), py::arg("in_features"),
        py::arg("m"), py::arg("window"));
}

} // namespace bitpalette
