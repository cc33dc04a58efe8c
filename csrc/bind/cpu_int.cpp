// Kernels of codecs `int` and `lut`.
#include <memory>

#include "../cpu/codes.h"
#include "../cpu/int8.h"
#include "bind.h"

namespace py = pybind11;

namespace bitpalette {
namespace {

// The forms by the names of kernels/activation_form.py.
InputForm form_named(const std::string& activations) {
    if (activations == "int8")
        return InputForm::int8_by_32;
    if (activations == "exact")
        return InputForm::int16_by_256;
    if (activations == "float32")
        return InputForm::f32;
    throw std::invalid_argument("no activations " + activations);
}

std::shared_ptr<LinearWeight> int_weight(int isa, const std::string& activations, uintptr_t codes, uintptr_t scale,
                                         uintptr_t zero, int bits, int64_t out, int64_t in, int64_t group_size) {
    CodesParts parts{};
    parts.codes = at<const uint8_t>(codes);
    parts.scale = at<const uint16_t>(scale);
    parts.zero = at<const uint8_t>(zero);
    parts.bits = bits;
    parts.out = out, parts.in = in, parts.group_size = group_size;
    return std::make_shared<CodesWeight>(isa_from_index(isa), form_named(activations), parts);
}

std::shared_ptr<LinearWeight> lut_weight(int isa, const std::string& activations, uintptr_t codes, uintptr_t scale,
                                         uintptr_t table, uintptr_t table_bytes, uintptr_t table_unit,
                                         bool table_by_row, int entries, int bits, int64_t out, int64_t in,
                                         int64_t group_size) {
    CodesParts parts{};
    parts.codes = at<const uint8_t>(codes);
    parts.scale = at<const uint16_t>(scale);
    parts.table = at<const uint16_t>(table);
    parts.table_bytes = at<const uint8_t>(table_bytes);
    parts.table_unit = at<const float>(table_unit);
    parts.table_by_row = table_by_row;
    parts.entries = entries;
    parts.bits = bits;
    parts.out = out, parts.in = in, parts.group_size = group_size;
    return std::make_shared<CodesWeight>(isa_from_index(isa), form_named(activations), parts);
}

std::shared_ptr<LinearWeight> int8_weight(int isa, const std::string& activations, uintptr_t codes, uintptr_t scale,
                                          int64_t out, int64_t in) {
    return std::make_shared<Int8Weight>(isa_from_index(isa), form_named(activations), at<const uint8_t>(codes),
                                        at<const uint16_t>(scale), out, in);
}

} // namespace

void bind_int(py::module_& m) {
    m.def("int_weight", &int_weight, "codec int in code planes (csrc/cpu/codes.h); zero 0: symmetric", py::kw_only(),
          py::arg("isa"), py::arg("activations"), py::arg("codes"), py::arg("scale"), py::arg("zero"), py::arg("bits"),
          py::arg("out"), py::arg("in_features"), py::arg("group_size"));
    m.def("lut_weight", &lut_weight, "codec lut in code planes (csrc/cpu/codes.h); scale 0: not scaled", py::kw_only(),
          py::arg("isa"), py::arg("activations"), py::arg("codes"), py::arg("scale"), py::arg("table"),
          py::arg("table_bytes"), py::arg("table_unit"), py::arg("table_by_row"), py::arg("entries"), py::arg("bits"),
          py::arg("out"), py::arg("in_features"), py::arg("group_size"));
    m.def("int8_weight", &int8_weight, "codec int at 8 bits, canonical (csrc/cpu/int8.h)", py::kw_only(),
          py::arg("isa"), py::arg("activations"), py::arg("codes"), py::arg("scale"), py::arg("out"),
          py::arg("in_features"));
}

} // namespace bitpalette
