#include "trellis_linear.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "half.h"

namespace bitpalette {
namespace {

TrellisRowWindows windows_of(const TrellisCode& code) {
    TrellisRowWindows windows{};
    for (int r = 0; r < trellis_side; ++r) {
        // a piece is read inside its tile: after the last tile there may be no memory
        const int last = trellis_side - 1;
        const int latest = code.bytes() - (r == last ? trellis_piece - 2 : trellis_piece);
        const int begin = r == last ? latest : std::min(code.offset(trellis_side * r) / 8, latest);
        windows.begin[r] = begin;
        for (int j = 0; j < trellis_pairs; ++j) {
            const int weight = trellis_side * r + 2 * j, bit = code.offset(weight);
            windows.right[r][j] = static_cast<uint32_t>(bit % 8);
            windows.left[r][j] = static_cast<uint32_t>(16 - bit % 8 - code.step(weight));
            for (int b = 0; b < 4; ++b) {
                // 7 + 5 + 16 bits are four bytes; what lies beyond the piece is beyond the windows as well
                const int byte = bit / 8 + b - begin;
                windows.pick[r][j][b] = static_cast<uint8_t>(byte < trellis_piece ? byte : 0x80);
            }
        }
    }
    return windows;
}

PanelKind panel_of(Isa isa, InputForm form, const TrellisLinearUnit& unit) {
    PanelKind kind{};
    kind.unit = unit.unpack == nullptr ? nullptr : panel_unit(isa);
    kind.fewest_tokens = 9; // 1.2 to 1.5 times as fast as rows, which take eight at a time
    kind.unpacked = PanelType::int16;
    kind.form = form;
    // 32 bits hold the sum of 128 columns * 510 * 32512
    kind.span = form == InputForm::int8_by_256 ? trellis_block : trellis_block / 2;
    kind.bias = 510, kind.top = 1020;
    return kind;
}

} // namespace

const TrellisRowWindows& trellis_row_windows(const TrellisCode& code) {
    // made once: 65 rates of 2 KiB
    static const std::vector<TrellisRowWindows> all = [] {
        std::vector<TrellisRowWindows> made;
        for (int m = trellis_least_bits; m <= trellis_most_bits; ++m)
            made.push_back(windows_of({m, 16}));
        return made;
    }();
    return all[static_cast<size_t>(code.m - trellis_least_bits)];
}

TrellisLinearUnit trellis_linear_unit(Isa isa, const TrellisWeight& w) {
    if (!isa_available(isa))
        throw std::invalid_argument(std::string("this machine has no ") + isa_name(isa));
    if (w.out < 1 || w.in < 1)
        throw std::invalid_argument("trellis: a weight [" + std::to_string(w.out) + ", " + std::to_string(w.in) + "]");
    trellis_check(w.code);
#if BITPALETTE_AVXVNNI
    if (isa == Isa::avxvnni)
        return trellis_linear_avxvnni;
#endif
#if BITPALETTE_X86
    if (isa == Isa::avx512vbmi)
        return {trellis_multiply_avx512vbmi, trellis_linear_avx512.decode, trellis_unpack_avx512vbmi};
    if (isa == Isa::avx512)
        return trellis_linear_avx512;
    if (isa == Isa::avx2)
        return trellis_linear_avx2;
#endif
#if BITPALETTE_AARCH64
    if (isa == Isa::neon)
        return trellis_linear_neon;
#endif
    return trellis_linear_scalar;
}

TrellisLinear::TrellisLinear(Isa isa, InputForm form, const uint8_t* codes, const uint16_t* scale, int64_t out,
                             int64_t in, TrellisCode code)
    : LinearWeight(out, in), weight_{codes, nullptr, out, in, code}, unit_(trellis_linear_unit(isa, weight_)),
      form_(form) {
    if (form == InputForm::int8_by_32)
        throw std::invalid_argument("trellis: inputs are float32, int8 or int16 by 256 columns, not int8 by 32");
    panel_ = panel_of(isa, form, unit_);
    for (int64_t r = 0; r < out; ++r)
        scale_.push_back(float_of_fp16(scale[r]));
    weight_.scale = scale_.data();
}

void TrellisLinear::multiply(const Activations& x, float* y, int64_t y_row, int64_t begin, int64_t end) const {
    thread_local TrellisInput input; // kept between calls: a decode step makes hundreds
    input.set(x, form_);
    const int planes = input.vectors_per_token();
    for (int64_t block = begin; block < end; ++block) {
        const int64_t row = block * trellis_side;
        const int rows = static_cast<int>(std::min<int64_t>(trellis_side, out - row));
        for (int64_t first = 0; first < input.vectors(); first += trellis_most_vectors) {
            const int n = static_cast<int>(std::min<int64_t>(trellis_most_vectors, input.vectors() - first));
            alignas(64) float sums[trellis_most_vectors][trellis_side];
            unit_.multiply(weight_, input.part(first, n), block, sums[0]);
            for (int v = 0; v < n; v += planes) {
                float* to = y + (first + v) / planes * y_row + row;
                for (int r = 0; r < rows; ++r) {
                    const float sum = planes == 1 ? sums[v][r] : sums[v][r] + sums[v + 1][r];
                    to[r] = sum * (weight_.scale[row + r] * (1.0f / 128));
                }
            }
        }
    }
}

void TrellisLinear::unpack(int64_t block, int64_t begin, int64_t end, const PanelBlock& to) const {
    const int64_t first = begin / trellis_side, last = std::min(end / trellis_side, weight_.tiles());
    unit_.unpack(weight_, block, first, last - first, *panel_.unit, to.values);
    for (int64_t column = begin, s = 0; column < end; column += panel_.span, ++s)
        for (int64_t r = 0; r < trellis_side; ++r) {
            const int64_t row = block * trellis_side + r;
            to.scale[s * trellis_side + r] = row < out ? weight_.scale[row] * (1.0f / 128) : 0.0f;
        }
}

void TrellisLinear::decode(const int64_t* index, int64_t begin, int64_t end, float* rows) const {
    unit_.decode(weight_, index, begin, end, rows);
}

} // namespace bitpalette
