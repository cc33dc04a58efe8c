// Reading memory, for measurements.
#include "../cpu/bandwidth.h"
#include "bind.h"

namespace py = pybind11;

namespace bitpalette {

void bind_bandwidth(py::module_& m) {
    m.def(
        "read_bytes",
        [](int isa, uintptr_t from, int64_t bytes, int threads) {
            const Isa set = isa_from_index(isa);
            const py::gil_scoped_release unlocked;
            return read_bytes(set, at<const uint8_t>(from), bytes, threads);
        },
        py::arg("isa"), py::arg("from"), py::arg("bytes"), py::arg("threads"),
        "Exclusive or of all whole 64-bit words among the bytes.");
}

} // namespace bitpalette
