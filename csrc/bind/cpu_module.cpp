// bitpalette._cpu: native quantizers and CPU kernels for Python. Its parts are the files beside this one.
#include "../cpu/parallel.h"
#include "bind.h"

namespace py = pybind11;
using namespace bitpalette;

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
    bind_quantizers(m);
    bind_int(m);
    bind_trellis(m);
    bind_linear(m);
    bind_bandwidth(m);
    bind_kv(m);
    bind_kv_rows(m);
    bind_decoder(m); // of weights that bind_linear declares
}
