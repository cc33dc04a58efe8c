#include "codes.h"

#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "half.h"
#include "panel_gemm_unit.h"

namespace bitpalette {
namespace {

CodesUnit unit_of(Isa isa) {
    if (!isa_available(isa))
        throw std::invalid_argument(std::string("this machine has no ") + isa_name(isa));
#if BITPALETTE_AVXVNNI
    if (isa == Isa::avxvnni)
        return codes_avxvnni;
#endif
#if BITPALETTE_X86
    if (plain_isa(isa) == Isa::avx512)
        return codes_avx512;
    if (plain_isa(isa) == Isa::avx2)
        return codes_avx2;
#endif
#if BITPALETTE_AARCH64
    if (isa == Isa::neon)
        return codes_neon;
#endif
    return codes_scalar;
}

void check(const CodesParts& p) {
    const std::string weight = "a weight [" + std::to_string(p.out) + ", " + std::to_string(p.in) + "]";
    if (p.out < 1 || p.in < 1)
        throw std::invalid_argument("codes: " + weight);
    if (p.group_size < 0 || p.group_size % codes_tile_columns != 0)
        throw std::invalid_argument("codes: group_size " + std::to_string(p.group_size) + " is no multiple of 32");
    const int least = p.table == nullptr ? 1 : 2, most = p.table == nullptr ? 8 : 4;
    if (p.bits < least || p.bits > most)
        throw std::invalid_argument("codes: " + std::to_string(p.bits) + " bits, not " + std::to_string(least) +
                                    " to " + std::to_string(most));
    if (p.table != nullptr && (p.entries <= 1 << (p.bits - 1) || p.entries > 1 << p.bits))
        throw std::invalid_argument("codes: a table of " + std::to_string(p.entries) + " entries and codes of " +
                                    std::to_string(p.bits) + " bits");
}

// Measured at 4096 x 4096 on one core of a Sapphire Rapids, panel over rows at 9 and 32 tokens: 1.3 and 1.4 with
// AVX-512, up to 2.3 where codes are bytes.
int64_t fewest_tokens(Isa isa, InputForm form, const CodesParts& p) {
    const bool table = p.table != nullptr;
    if (form == InputForm::int8_by_32 && !table) {
        if (isa == Isa::scalar) // half as fast as rows, which compilers turn into vectors
            return INT64_MAX;
        if (isa == Isa::avx2 && p.bits <= 6) // .73 to 1.1 and .95 to 1.5: products of bytes need room, as in rows
            return 32;
    }
    if (form == InputForm::f32 && table && !p.table_by_row &&
        plain_isa(isa) == Isa::avx512) // .55 and 1: levels are decoded
        return 32;
    return 9;
}

PanelKind panel_of(Isa isa, InputForm form, const CodesParts& p) {
    const bool table = p.table != nullptr;
    PanelKind kind{};
    kind.unit = panel_unit(isa);
    kind.unpacked = table && form == InputForm::f32 ? PanelType::f32 : PanelType::uint8;
    kind.form = form == InputForm::int8_by_32 ? InputForm::int8_by_128 : form;
    const int block = form == InputForm::f32 ? 128 : input_block(kind.form);
    kind.span = p.group_size == 0 ? block : static_cast<int>(std::gcd<int64_t>(p.group_size, block));
    kind.bias = table ? 128 : p.zero != nullptr ? 0 : p.bits == 1 ? 1 : 1 << (p.bits - 1);
    kind.top = table ? 255 : p.bits == 1 ? 2 : (1 << p.bits) - 1;
    kind.has_offset = p.zero != nullptr;
    kind.fewest_tokens = fewest_tokens(isa, form, p);
    return kind;
}

} // namespace

CodesWeight::CodesWeight(Isa isa, InputForm form, const CodesParts& p) : LinearWeight(p.out, p.in), form_(form) {
    check(p);
    const int64_t tiles = (p.in + codes_tile_columns - 1) / codes_tile_columns;
    const bool by_row = p.table != nullptr && p.table_by_row;
    if (p.table != nullptr && !by_row)
        for (int i = 0; i < p.entries; ++i)
            levels_[i] = float_of_fp16(p.table[i]);
    view_.codes = p.codes;
    view_.scale = p.scale;
    view_.zero = p.zero;
    view_.offset = p.bits == 1 ? 0.5f : static_cast<float>(1 << (p.bits - 1));
    view_.levels = p.table == nullptr || by_row ? nullptr : levels_;
    view_.row_tables = by_row ? p.table : nullptr;
    view_.table_bytes = p.table_bytes;
    view_.table_unit = p.table_unit;
    view_.entries = p.entries;
    view_.bits = p.bits;
    view_.out = p.out, view_.in = p.in, view_.tiles = tiles;
    view_.groups = p.group_size == 0 ? 1 : (p.in + p.group_size - 1) / p.group_size;
    view_.tiles_per_group = p.group_size == 0 ? tiles : p.group_size / codes_tile_columns;
    functions_ = unit_of(isa)(view_, form);
    if (functions_.multiply == nullptr)
        throw std::invalid_argument("codes: no kernel for input form " + std::to_string(static_cast<int>(form)) +
                                    (p.table == nullptr ? "" : " and a table"));
    panel_ = panel_of(isa, form, p);
}

int64_t CodesWeight::bytes() const {
    const int64_t parameters = (view_.scale == nullptr ? 0 : 2) + (view_.zero == nullptr ? 0 : 1);
    return blocks() * (view_.tiles * view_.bits * codes_plane_bytes + view_.groups * linear_block_rows * parameters);
}

void CodesWeight::multiply(const Activations& x, float* y, int64_t y_row, int64_t begin, int64_t end) const {
    thread_local std::vector<int32_t> starts; // kept from call to call
    thread_local std::vector<float> sums;
    const size_t tiles = static_cast<size_t>(x.tokens() * view_.tiles);
    CodesInput input{};
    input.tokens = x.tokens();
    if (form_ == InputForm::f32) {
        input.values = x.floats().values, input.row = x.floats().row;
        if (view_.levels == nullptr && view_.row_tables == nullptr) {
            sums.resize(tiles);
            functions_.float_sums(view_, input, sums.data());
            input.negative_sum = sums.data();
        }
    } else {
        input.blocks = x.int8(form_), input.row = input.blocks.row;
        starts.resize(tiles);
        functions_.integer_starts(view_, input, starts.data());
        input.start = starts.data();
    }
    functions_.multiply(view_, input, y, y_row, begin, end);
}

void CodesWeight::unpack(int64_t block, int64_t begin, int64_t end, const PanelBlock& to) const {
    functions_.unpack(view_, block, begin, end, panel_.span, to);
}

void CodesWeight::decode(const int64_t* index, int64_t begin, int64_t end, float* rows) const {
    for (int64_t i = begin; i < end; ++i)
        functions_.decode(view_, index[i], rows + i * in);
}

} // namespace bitpalette
