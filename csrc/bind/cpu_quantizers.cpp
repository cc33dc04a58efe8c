// Native parts of the quantizers.
#include "../cpu/kmeans.h"
#include "../cpu/trellis_encode.h"
#include "bind.h"

namespace py = pybind11;

namespace bitpalette {

void bind_quantizers(py::module_& m) {
    m.def(
        "kmeans_rows",
        [](uintptr_t values, uintptr_t weights, int64_t rows, int64_t n, int64_t entries, uintptr_t levels,
           int threads) {
            const py::gil_scoped_release unlocked;
            kmeans_rows(at<const float>(values), at<const float>(weights), rows, n, entries, at<float>(levels),
                        threads);
        },
        py::arg("values"), py::arg("weights"), py::arg("rows"), py::arg("n"), py::arg("entries"), py::arg("levels"),
        py::arg("threads"));
    m.def(
        "trellis_encode",
        [](int isa, uintptr_t x, int64_t tiles, int row_bits, int window, uintptr_t codes, uintptr_t levels,
           int threads) {
            const py::gil_scoped_release unlocked;
            return trellis_encode(isa_from_index(isa), at<const float>(x), tiles, {row_bits, window},
                                  at<uint8_t>(codes), at<float>(levels), threads);
        },
        py::arg("isa"), py::arg("x"), py::arg("tiles"), py::arg("m"), py::arg("window"), py::arg("codes"),
        py::arg("levels"), py::arg("threads"));
}

} // namespace bitpalette
