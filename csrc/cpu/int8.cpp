#include "int8.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

namespace bitpalette {
namespace {

const Int8Unit& unit_of(Isa isa) {
    if (!isa_available(isa))
        throw std::invalid_argument(std::string("this machine has no ") + isa_name(isa));
#if BITPALETTE_AVXVNNI
    if (isa == Isa::avxvnni)
        return int8_avxvnni;
#endif
#if BITPALETTE_X86
    if (plain_isa(isa) == Isa::avx512)
        return int8_avx512;
    if (plain_isa(isa) == Isa::avx2)
        return int8_avx2;
#endif
#if BITPALETTE_AARCH64
    if (isa == Isa::neon)
        return int8_neon;
#endif
    return int8_scalar;
}

Int8Unit::Multiply multiply_of(const Int8Unit& unit, InputForm form) {
    if (form == InputForm::int8_by_32)
        return unit.one_plane;
    if (form == InputForm::int16_by_256)
        return unit.two_planes;
    if (form == InputForm::f32)
        return unit.floats;
    throw std::invalid_argument("int8: no kernel for input form " + std::to_string(static_cast<int>(form)));
}

} // namespace

Int8Weight::Int8Weight(Isa isa, InputForm form, const uint8_t* codes, const uint16_t* scale, int64_t out, int64_t in)
    : LinearWeight(out, in), form_(form), view_{codes, scale, out, in}, unit_(unit_of(isa)),
      multiply_(multiply_of(unit_, form)) {
    if (out < 1 || in < 1)
        throw std::invalid_argument("int8: a weight [" + std::to_string(out) + ", " + std::to_string(in) + "]");
}

void Int8Weight::multiply(const Activations& x, float* y, int64_t y_row, int64_t begin, int64_t end) const {
    thread_local std::vector<int32_t> start; // kept from call to call
    thread_local std::vector<float> scale;
    Int8Input input{};
    input.tokens = x.tokens(), input.row = x.floats().row;
    if (form_ == InputForm::f32) {
        input.values = x.floats().values;
    } else {
        input.blocks = x.int8(form_);
        start.resize(static_cast<size_t>(input.tokens * input.row / int8_quad_columns));
        scale.resize(start.size());
        unit_.expand(input, start.data(), scale.data());
        input.start = start.data(), input.scale = scale.data();
    }
    multiply_(view_, input, y, y_row, begin * linear_block_rows, std::min(end * linear_block_rows, out));
}

void Int8Weight::decode(const int64_t* index, int64_t begin, int64_t end, float* rows) const {
    for (int64_t i = begin; i < end; ++i)
        unit_.decode(view_, index[i], rows + i * in);
}

} // namespace bitpalette
