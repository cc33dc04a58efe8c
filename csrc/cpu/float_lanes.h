// What a vocabulary of float32 lanes has beyond its registers: 16-bit elements, and functions made of its instructions.
//
// A body is a template over V, one of float_lanes_{avx512,avx2,scalar}.h, and includes no more than that header: all of
// it is in unnamed namespaces, and nothing of the standard library's templates is called (a function with external
// linkage compiled with, say, AVX-512 could be the copy that the linker keeps for all).
#pragma once

#include <cstdint>
#include <cstring>

namespace bitpalette {
namespace {

// Elements of tensors, so that overloads of V::load tell 16-bit types apart.
struct Bf16 {
    uint16_t bits;
};
struct Fp16 {
    uint16_t bits;
};

// e^x to about 1 ulp for x in -86.5..88.3, clamped there; NaN stays NaN. Cody and Waite's reduction by ln 2 in two
// parts, then the Taylor polynomial of degree 7 on +-ln(2)/2, whose next term is below 2^-27 of the result.
template <class V>
inline typename V::Floats exponential(typename V::Floats x) {
    x = V::minimum(V::all(88.3f), V::maximum(V::all(-86.5f), x)); // NaN is second in both, which keeps it
    // 1.5 * 2^23: the sum's low bits are the nearest whole number
    const typename V::Floats shifted = V::multiply_add(x, V::all(1.44269504f), V::all(12582912.0f));
    const typename V::Floats n = V::subtract(shifted, V::all(12582912.0f));
    typename V::Floats r = V::multiply_add(n, V::all(-0.693359375f), x); // exact: few bits, and n is small
    r = V::multiply_add(n, V::all(2.12194440e-4f), r);
    constexpr float coefficients[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    typename V::Floats y = V::all(1.0f / 5040);
    for (const float c : coefficients)
        y = V::multiply_add(y, r, V::all(c));
    return V::times_power_of_two(y, shifted);
}

} // namespace
} // namespace bitpalette
