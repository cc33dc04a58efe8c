// The body of trellis_decode_*.cpp, in plain loops that each translation unit's flags turn into its own vectors.
// Everything is in an unnamed namespace: a function shared by name between units would be linked once, with one unit's
// instructions.
#pragma once

#include "trellis_decode_unit.h"

namespace bitpalette {
namespace {

void decode_row(const TrellisWeight& w, int64_t row, float* y) {
    const int64_t tiles = w.tiles();
    const int r = static_cast<int>(row % trellis_side);
    const float step = w.scale[row] * (1.0f / 128);
    for (int64_t c = 0; c < tiles; ++c) {
        const uint8_t* tile = w.codes + ((row / trellis_side) * tiles + c) * w.code.bytes();
        const int64_t columns = w.in - c * trellis_side < trellis_side ? w.in - c * trellis_side : trellis_side;
        for (int64_t k = 0; k < columns; ++k)
            y[c * trellis_side + k] =
                static_cast<float>(trellis_level(w.code.state(tile, trellis_side * r + static_cast<int>(k)))) * step;
    }
}

float dot(const float* a, const float* b, int64_t n) {
    constexpr int lanes = 64;
    float sums[lanes] = {};
    int64_t k = 0;
    for (; k + lanes <= n; k += lanes)
        for (int j = 0; j < lanes; ++j)
            sums[j] += a[k + j] * b[k + j];
    float total = 0;
    for (; k < n; ++k)
        total += a[k] * b[k];
    for (int width = lanes / 2; width > 0; width /= 2)
        for (int j = 0; j < width; ++j)
            sums[j] += sums[j + width];
    return total + sums[0];
}

void decode_rows(const TrellisWeight& w, const int64_t* index, int64_t begin, int64_t end, float* y) {
    for (int64_t i = begin; i < end; ++i)
        decode_row(w, index == nullptr ? i : index[i], y + i * w.in);
}

void linear_rows(const TrellisWeight& w, const float* x, int64_t tokens, float* y, int64_t begin, int64_t end,
                 float* row) {
    for (int64_t r = begin; r < end; ++r) {
        decode_row(w, r, row);
        for (int64_t t = 0; t < tokens; ++t)
            y[t * w.out + r] = dot(row, x + t * w.in, w.in);
    }
}

constexpr TrellisDecodeUnit unit{decode_rows, linear_rows};

} // namespace
} // namespace bitpalette
