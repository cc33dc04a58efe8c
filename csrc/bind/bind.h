// The parts of bitpalette._cpu. Tensors come as addresses (torch's data_ptr()); the caller in quant/ or kernels/ has
// checked devices, types and contiguity, and keeps the tensors alive.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../cpu/activations.h"
#include "../cpu/dtype.h"
#include "../cpu/isa.h"

namespace bitpalette {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

inline Isa isa_from_index(int index) {
    if (index < 0 || index >= isa_count)
        throw std::invalid_argument("no instruction set " + std::to_string(index));
    return static_cast<Isa>(index);
}

inline InputForm input_form_from_index(int index) {
    if (index < 0 || index > 3)
        throw std::invalid_argument("no form of inputs " + std::to_string(index));
    return static_cast<InputForm>(index);
}

inline Dtype dtype_from_index(int index) {
    if (index < 0 || index > 2)
        throw std::invalid_argument("no dtype " + std::to_string(index));
    return static_cast<Dtype>(index);
}

void bind_bandwidth(pybind11::module_& m);
void bind_decoder(pybind11::module_& m);
void bind_int(pybind11::module_& m);
void bind_kv(pybind11::module_& m);
void bind_kv_rows(pybind11::module_& m);
void bind_linear(pybind11::module_& m);
void bind_quantizers(pybind11::module_& m);
void bind_trellis(pybind11::module_& m);

} // namespace bitpalette
