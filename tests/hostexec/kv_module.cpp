// What kernels/kv_cuda.py calls, as a module of its own: quicker to build than all of bitpalette._cuda.
#include <pybind11/pybind11.h>

namespace bitpalette {
void bind_cuda_kv(pybind11::module_& m);
}

PYBIND11_MODULE(_cuda, m) {
    bitpalette::bind_cuda_kv(m);
    m.def("shared_limit", [] { return 99 * 1024; });
}
