// bitpalette._cpu: the CPU kernels for Python. Tensors come as addresses (torch's data_ptr()); the caller in kernels/
// has checked devices, types and contiguity, and keeps the tensors alive.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "../cpu/int4.h"
#include "../cpu/int8.h"
#include "../cpu/isa.h"
#include "../cpu/kmeans.h"
#include "../cpu/parallel.h"
#include "../cpu/trellis_decode.h"
#include "../cpu/trellis_encode.h"
#include "../cpu/trellis_linear.h"

namespace py = pybind11;
using namespace bitpalette;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Isa isa_from_index(int index) {
    if (index < 0 || index >= isa_count)
        throw std::invalid_argument("no instruction set " + std::to_string(index));
    return static_cast<Isa>(index);
}

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

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU kernels of bitpalette";
    m.attr("interface_version") = 1;
    m.def("isas", [] {
        py::dict found; // {name: index} of those this machine runs, slowest first
        for (int i = 0; i < isa_count; ++i)
            if (isa_available(static_cast<Isa>(i)))
                found[isa_name(static_cast<Isa>(i))] = i;
        return found;
    });
    m.def("use_openmp_runtime", [](uintptr_t parallel, uintptr_t number, uintptr_t count) {
        use_openmp_runtime(at<void>(parallel), at<void>(number), at<void>(count));
    });
    m.def("has_openmp_runtime", &has_openmp_runtime);
    py::class_<Int4Layer>(m, "Int4Layer", "A packed weight by the addresses of its tensors, which it does not own.")
        .def(py::init(&int4_layer), py::arg("isa"), py::arg("codes"), py::arg("scale"), py::arg("zero"), py::arg("out"),
             py::arg("in_features"), py::arg("group_size"))
        .def("linear",
             [](const Int4Layer& layer, uintptr_t x, uintptr_t bias, uintptr_t y, int dtype, int64_t tokens,
                int threads) {
                 if (dtype < 0 || dtype > 2)
                     throw std::invalid_argument("no dtype " + std::to_string(dtype));
                 const py::gil_scoped_release unlocked;
                 int4_linear(layer.isa, layer.weight, at<const void>(x), at<const void>(bias), at<void>(y),
                             static_cast<Dtype>(dtype), tokens, threads);
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
