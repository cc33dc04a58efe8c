// fp16 and bf16 as a GPU computes with them: every operation rounded once, to nearest even, denormal numbers kept.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace hostexec {

template <class To, class From>
inline To bits_of(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

struct Half {
    static constexpr int mantissa = 10, bias = 15;
    static constexpr uint16_t nan = 0x7fff; // what the hardware returns
};
struct Bfloat {
    static constexpr int mantissa = 7, bias = 127;
    static constexpr uint16_t nan = 0x7fff;
};

// Its value, exactly.
template <class F>
inline double decode(uint16_t bits) {
    constexpr int exponents = (1 << (15 - F::mantissa)) - 1;
    const int exponent = bits >> F::mantissa & exponents;
    const uint64_t fraction = bits & ((1 << F::mantissa) - 1);
    const uint64_t sign = static_cast<uint64_t>(bits >> 15) << 63;
    if (exponent == 0) {
        const double value = std::ldexp(static_cast<double>(fraction), 1 - F::bias - F::mantissa);
        return sign ? -value : value;
    }
    const uint64_t wide = exponent == exponents ? 2047 : static_cast<uint64_t>(exponent - F::bias + 1023);
    return bits_of<double>(sign | wide << 52 | fraction << (52 - F::mantissa));
}

// Rounded to nearest even; from the middle of the last step on infinite.
template <class F>
inline uint16_t encode(double value) {
    constexpr int exponents = (1 << (15 - F::mantissa)) - 1;
    if (value != value)
        return F::nan;
    const uint64_t bits = bits_of<uint64_t>(value);
    const uint16_t sign = static_cast<uint16_t>(bits >> 48 & 0x8000);
    const int exponent = static_cast<int>(bits >> 52 & 2047) - 1023 + F::bias;
    if (exponent >= exponents) // infinite, or too large whatever the rounding
        return static_cast<uint16_t>(sign | exponents << F::mantissa);
    // of the 53 bits of the mantissa this many go; all of it is below half of the least number when it is 54 or more
    const int drop = 52 - F::mantissa + (exponent < 1 ? 1 - exponent : 0);
    if (drop > 53)
        return sign;
    const uint64_t mantissa = (bits & ((1ull << 52) - 1)) | 1ull << 52;
    const uint64_t kept = mantissa >> drop, rest = mantissa & ((1ull << drop) - 1), half = 1ull << (drop - 1);
    const uint64_t rounded = kept + (rest > half || (rest == half && (kept & 1)));
    // the leading bit of `kept` counts one step of the exponent, and a carry out of it the next
    const uint64_t base = exponent < 1 ? 0 : static_cast<uint64_t>(exponent - 1) << F::mantissa;
    return static_cast<uint16_t>(sign | (base + rounded));
}

// a b + c for one of a pair. The product of two is exact in a double, the sum may not be: rounded to odd there, the
// second rounding comes out as if it were the only one (Boldo and Melquiond 2008).
template <class F>
inline uint16_t fma_one(uint16_t a, uint16_t b, uint16_t c) {
    const double product = decode<F>(a) * decode<F>(b), other = decode<F>(c), sum = product + other;
    if (!std::isfinite(sum))
        return encode<F>(sum);
    const double of_other = sum - product, of_product = sum - of_other;
    const double lost = (product - of_product) + (other - of_other);
    uint64_t bits = bits_of<uint64_t>(sum);
    if (lost != 0 && !(bits & 1)) // towards the exact value, which lies between two neighbours of which one is odd
        bits += (lost > 0) == (sum > 0) ? 1 : -1;
    return encode<F>(bits_of<double>(bits));
}

template <class F>
inline uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
    const uint32_t lo = fma_one<F>(static_cast<uint16_t>(a), static_cast<uint16_t>(b), static_cast<uint16_t>(c));
    const uint32_t hi =
        fma_one<F>(static_cast<uint16_t>(a >> 16), static_cast<uint16_t>(b >> 16), static_cast<uint16_t>(c >> 16));
    return hi << 16 | lo;
}

// .ftz
inline float flush(float a) {
    return std::fabs(a) < std::numeric_limits<float>::min() ? std::copysign(0.f, a) : a;
}

} // namespace hostexec
