#include "dense_weight.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace bitpalette {
namespace {

const DenseCalls& calls_of(Isa isa, Dtype dtype) {
    if (!isa_available(isa))
        throw std::invalid_argument(std::string("this machine has no ") + isa_name(isa));
    const DenseUnit* unit = &dense_scalar;
#if BITPALETTE_X86
    if (plain_isa(isa) == Isa::avx2)
        unit = &dense_avx2;
    if (plain_isa(isa) == Isa::avx512)
        unit = &dense_avx512;
#endif
#if BITPALETTE_AARCH64
    if (isa == Isa::neon)
        unit = &dense_neon;
#endif
    return unit->of[static_cast<int>(dtype)];
}

} // namespace

DenseWeight::DenseWeight(Isa isa, const void* values, Dtype dtype, int64_t out, int64_t in)
    : LinearWeight(out, in), calls_(calls_of(isa, dtype)), values_(static_cast<const unsigned char*>(values)),
      element_(dtype == Dtype::f32 ? 4 : 2) {
    if (out < 1 || in < 1)
        throw std::invalid_argument("a dense weight [" + std::to_string(out) + ", " + std::to_string(in) + "]");
}

void DenseWeight::multiply(const Activations& x, float* y, int64_t y_row, int64_t begin, int64_t end) const {
    calls_.multiply(values_, in, x.floats(), x.tokens(), y, y_row, begin * linear_block_rows,
                    std::min(end * linear_block_rows, out));
}

void DenseWeight::decode(const int64_t* index, int64_t begin, int64_t end, float* rows) const {
    for (int64_t i = begin; i < end; ++i)
        calls_.row(values_ + index[i] * in * element_, in, rows + i * in);
}

} // namespace bitpalette
