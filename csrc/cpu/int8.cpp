#include "int8.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "half.h"
#include "panel_gemm_unit.h"

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

PanelKind panel_of(Isa isa, InputForm form) {
    PanelKind kind{};
    kind.unit = panel_unit(isa);
    kind.fewest_tokens = 9; // 1.4 times as fast as rows with AVX-512 and AVX2, 3 times in portable code
    kind.unpacked = PanelType::uint8;
    kind.form = form == InputForm::int8_by_32 ? InputForm::int8_by_128 : form;
    kind.span = form == InputForm::f32 ? 128 : input_block(kind.form);
    kind.bias = 128, kind.top = 255;
    return kind;
}

} // namespace

Int8Weight::Int8Weight(Isa isa, InputForm form, const uint8_t* codes, const uint16_t* scale, int64_t out, int64_t in)
    : LinearWeight(out, in), form_(form), view_{codes, scale, out, in}, unit_(unit_of(isa)),
      multiply_(multiply_of(unit_, form)), panel_(panel_of(isa, form)) {
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

void Int8Weight::unpack(int64_t block, int64_t begin, int64_t end, const PanelBlock& to) const {
    constexpr int64_t whole = 64; // bytes, which `interleave` takes at a time
    const int64_t row = block * panel_rows, last = std::min(end, in), full = (last - begin) / whole * whole;
    const uint8_t* rows[panel_rows];
    alignas(64) uint8_t rest[panel_rows][whole];
    for (int64_t r = 0; r < panel_rows; ++r) { // rows that are not there repeat the last
        rows[r] = view_.codes + std::min(row + r, out - 1) * in + begin;
        std::copy_n(rows[r] + full, last - begin - full, rest[r]);
        for (int64_t i = 0; i < end - begin; i += whole)
            __builtin_prefetch(rows[r] + (end - begin) + i, 0, 2); // what is unpacked next
    }
    panel_.unit->interleave(rows, full / int8_quad_columns, to.values);
    if (full < end - begin) {
        alignas(64) uint8_t steps[panel_rows * whole];
        for (int r = 0; r < panel_rows; ++r)
            rows[r] = rest[r];
        panel_.unit->interleave(rows, whole / int8_quad_columns, steps);
        std::copy_n(steps, (end - begin - full) * panel_rows, to.values + full * panel_rows);
    }
    for (int64_t column = begin, s = 0; column < end; column += panel_.span, ++s)
        for (int64_t r = 0; r < panel_rows; ++r)
            to.scale[s * panel_rows + r] = row + r < out ? float_of_fp16(view_.scale[row + r]) : 0.0f;
}

void Int8Weight::decode(const int64_t* index, int64_t begin, int64_t end, float* rows) const {
    for (int64_t i = begin; i < end; ++i)
        unit_.decode(view_, index[i], rows + i * in);
}

} // namespace bitpalette
