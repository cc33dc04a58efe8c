// The body of int8_*.cpp, in plain loops that each translation unit's flags turn into its own vectors. Everything is in
// an unnamed namespace: a function shared by name between units would be linked once, with one unit's instructions.
#pragma once

#include "int8.h"

namespace bitpalette {
namespace {

constexpr int lanes = 64; // independent sums: four registers of sixteen floats hide the latency of the additions

float dot(const float* a, const float* b, int64_t n) {
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

void int8_rows(const Int8Weight& w, const float* x, int64_t tokens, float* y, int64_t begin, int64_t end, float* row) {
    for (int64_t r = begin; r < end; ++r) {
        const uint8_t* codes = w.codes + r * w.in;
        for (int64_t k = 0; k < w.in; ++k)
            row[k] = static_cast<float>(static_cast<int8_t>(codes[k] ^ 0x80)); // code - 128
        for (int64_t t = 0; t < tokens; ++t)
            y[t * w.out + r] = dot(row, x + t * w.in, w.in) * w.scale[r];
    }
}

} // namespace
} // namespace bitpalette
