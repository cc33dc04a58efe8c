// The body of kv_append_*.cpp over the float lanes V. Plain loops: what they add they add in a fixed order, so that
// every instruction set gives the same bits.
#pragma once

#include <cstring>

#include "float_lanes.h"
#include "half.h"
#include "kv_append.h"

namespace bitpalette {
namespace {

template <class V, class T>
inline void load_row(const T* x, const float* mean, int64_t width, float* z) {
    for (int64_t i = 0; i < width; i += V::lanes) {
        const bool whole = i + V::lanes <= width;
        const int n = whole ? V::lanes : static_cast<int>(width - i);
        auto f = whole ? V::load(x + i) : V::load(x + i, n);
        if (mean != nullptr)
            f = V::subtract(f, whole ? V::load(mean + i) : V::load(mean + i, n));
        if (whole)
            V::store(z + i, f);
        else
            V::store(z + i, f, n);
    }
}

// z [p, width] = matrix room, products added one after another
inline void apply_matrix(const KvRotation& r, const float* from, float* z) {
    for (int64_t i = 0; i < r.p; ++i) {
        float* row = z + i * r.width;
        const float* factors = r.matrix + i * r.p;
        for (int64_t c = 0; c < r.width; ++c)
            row[c] = factors[0] * from[c];
        for (int64_t j = 1; j < r.p; ++j)
            for (int64_t c = 0; c < r.width; ++c) {
                const float product = factors[j] * from[j * r.width + c];
                row[c] += product;
            }
    }
}

template <class V>
void load_token(const KvTokens& x, const KvRotation& rotation, int64_t token, int64_t head, float* z, float* room) {
    const int64_t at = token * x.token_stride + head * x.head_stride;
    const float* mean = x.mean == nullptr ? nullptr : x.mean + head * x.width;
    const int64_t padded = (x.width + transform_columns - 1) / transform_columns * transform_columns;
    float* first = x.rotate && rotation.p > 1 ? room : z;
    for (int64_t i = x.width; i < padded; ++i)
        first[i] = 0;
    if (x.dtype == Dtype::f32)
        load_row<V>(static_cast<const float*>(x.x) + at, mean, x.width, first);
    else if (x.dtype == Dtype::f16)
        load_row<V>(static_cast<const Fp16*>(x.x) + at, mean, x.width, first);
    else
        load_row<V>(static_cast<const Bf16*>(x.x) + at, mean, x.width, first);
    if (!x.rotate)
        return;
    rotation.ops->hadamard(first, padded, rotation.width);
    for (int64_t i = 0; i < x.width; ++i)
        first[i] *= rotation.unit;
    if (rotation.p > 1)
        apply_matrix(rotation, room, z);
}

inline void pack_row(const uint8_t* codes, int64_t width, int bits, uint8_t* to) {
    if (bits == 8) {
        std::memcpy(to, codes, static_cast<size_t>(width));
    } else if (bits == 4) {
        for (int64_t i = 0; i < width / 2; ++i)
            to[i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
    } else {
        for (int64_t i = 0; i < width / 4; ++i) {
            const uint8_t* c = codes + 4 * i;
            to[i] = static_cast<uint8_t>((c[0] & 3) | (c[1] & 3) << 2 | (c[2] & 3) << 4 | (c[3] & 3) << 6);
        }
        if (bits == 3)
            for (int64_t i = 0; i < width / 8; ++i) {
                uint8_t high = 0;
                for (int k = 0; k < 8; ++k)
                    high = static_cast<uint8_t>(high | codes[8 * i + k] >> 2 << k);
                to[width / 4 + i] = high;
            }
    }
}

inline double total_of(const double (&sum)[8]) {
    return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

inline void encode_row(const float* z, int64_t width, int bits, bool unbiased, float step, uint8_t* codes,
                       uint8_t* packed, uint16_t* gain) {
    // products of float32 are exact in float64; eight sums, so that they are in no instruction's way
    double sum[8] = {};
    for (int64_t i = 0; i < width; i += 8)
        for (int k = 0; k < 8; ++k)
            sum[k] += static_cast<double>(z[i + k]) * static_cast<double>(z[i + k]);
    const double energy = total_of(sum);
    const float scale = static_cast<float>(__builtin_sqrt(energy / static_cast<double>(width))) * step;
    const bool usable = scale > 0 && scale <= 3.402823466e38f;
    const int half = 1 << (bits - 1), most = 2 * half - 1;
    if (!usable) { // zeros have gain 0; NaN and infinity have gain NaN, and so has attention over them
        std::memset(codes, half, static_cast<size_t>(width));
        pack_row(codes, width, bits, packed);
        *gain = scale == 0 ? 0 : 0x7E00;
        return;
    }
    double along[8] = {};
    int64_t squares = 0;
    for (int64_t i = 0; i < width; i += 8)
        for (int k = 0; k < 8; ++k) {
            const float position = z[i + k] / scale + static_cast<float>(half);
            const float low = position > 0 ? position : 0.0f;
            const int code = static_cast<int>(low < static_cast<float>(most) ? low : static_cast<float>(most));
            codes[i + k] = static_cast<uint8_t>(code);
            const int level = 2 * code - most;
            along[k] += static_cast<double>(z[i + k]) * static_cast<double>(level);
            squares += level * level;
        }
    const double shared = total_of(along);
    const double exact = unbiased ? energy / shared : shared / static_cast<double>(squares);
    *gain = fp16_of_float(exact < 65504 ? static_cast<float>(exact) : 65504.0f);
    pack_row(codes, width, bits, packed);
}

template <class V>
constexpr KvAppendUnit kv_append_unit{load_token<V>, encode_row};

} // namespace
} // namespace bitpalette
