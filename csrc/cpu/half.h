// 16-bit floats one at a time, in portable code: conversions outside inner loops. Everything is in an unnamed
// namespace, since units with different instruction sets include it.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtype.h"

namespace bitpalette {
namespace {

inline float float_of_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t bits_of_float(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of_bf16(uint16_t half) {
    return float_of_bits(static_cast<uint32_t>(half) << 16);
}

// Round to nearest even; NaN stays NaN.
inline uint16_t bf16_of_float(float value) {
    const uint32_t bits = bits_of_float(value);
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? (bits >> 16 | 0x40) : rounded);
}

inline float float_of_fp16(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = half & 0x7FFF;
    if (rest >= 0x7C00) // infinity, NaN
        return float_of_bits(sign | 0x7F800000 | (rest & 0x3FF) << 13);
    if (rest < 0x400) // zero, subnormal: a whole number of 2^-24
        return float_of_bits(sign | bits_of_float(static_cast<float>(rest) * 0x1p-24f));
    return float_of_bits(sign | ((rest << 13) + (112u << 23)));
}

// Round to nearest even; what is too large becomes infinity, NaN stays NaN.
inline uint16_t fp16_of_float(float value) {
    const uint32_t bits = bits_of_float(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7FFFFFFF;
    if (rest > 0x7F800000)
        return static_cast<uint16_t>(sign | 0x7E00);
    if (rest >= 0x477FF000) // 65520, half way to what would come after the largest
        return static_cast<uint16_t>(sign | 0x7C00);
    if (rest < 0x38800000) // below 2^-14: adding 1/2 leaves multiples of 2^-24 in the low bits, rounded
        return static_cast<uint16_t>(sign | (bits_of_float(float_of_bits(rest) + 0.5f) - 0x3F000000));
    const uint32_t rounded = rest + 0xFFF + (rest >> 13 & 1) - (112u << 23);
    return static_cast<uint16_t>(sign | rounded >> 13);
}

inline float load_element(const void* from, Dtype dtype, int64_t i) {
    if (dtype == Dtype::f32)
        return static_cast<const float*>(from)[i];
    const uint16_t half = static_cast<const uint16_t*>(from)[i];
    return dtype == Dtype::bf16 ? float_of_bf16(half) : float_of_fp16(half);
}

inline void store_element(void* to, Dtype dtype, int64_t i, float value) {
    if (dtype == Dtype::f32)
        static_cast<float*>(to)[i] = value;
    else
        static_cast<uint16_t*>(to)[i] = dtype == Dtype::bf16 ? bf16_of_float(value) : fp16_of_float(value);
}

} // namespace
} // namespace bitpalette
