// What the native test programs are made of: memory that ends where its contents do, and numbers to fill it with.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "cpu/half.h"

namespace bitpalette {
namespace {

// n elements on the heap, at an odd multiple of `align` bytes, and nothing behind them: AddressSanitizer reports the
// first byte after them.
template <class T>
class Exact {
  public:
    Exact() = default;
    explicit Exact(int64_t n, size_t align = sizeof(T))
        : n_(n), skipped_(align), memory_(new unsigned char[static_cast<size_t>(n) * sizeof(T) + align]) {}

    void fill(T value) {
        for (int64_t i = 0; i < n_; ++i)
            (*this)[i] = value;
    }
    // operator new aligns to 16 bytes
    T* data() const { return memory_ ? reinterpret_cast<T*>(memory_.get() + skipped_) : nullptr; }
    T& operator[](int64_t i) const { return data()[i]; }
    int64_t size() const { return n_; }

  private:
    int64_t n_ = 0;
    size_t skipped_ = 0;
    std::unique_ptr<unsigned char[]> memory_;
};

class Numbers {
  public:
    explicit Numbers(uint32_t seed) : state_(seed * 2654435761u + 1) {}

    uint32_t next() {
        state_ = state_ * 1664525 + 1013904223;
        return state_ >> 8;
    }
    // -1..1
    float number() { return static_cast<float>(next()) / (1 << 23) - 1; }

    Exact<float> floats(int64_t n) {
        Exact<float> x(n);
        for (int64_t i = 0; i < n; ++i)
            x[i] = number();
        return x;
    }
    // 0.5..1.5 times `size`
    Exact<uint16_t> scales(int64_t n, float size) {
        Exact<uint16_t> x(n);
        for (int64_t i = 0; i < n; ++i)
            x[i] = fp16_of_float((1 + number() / 2) * size);
        return x;
    }
    Exact<uint8_t> bytes(int64_t n, uint32_t below = 256) {
        Exact<uint8_t> x(n);
        for (int64_t i = 0; i < n; ++i)
            x[i] = static_cast<uint8_t>(next() % below);
        return x;
    }
    // n elements of a type, from floats
    Exact<unsigned char> elements(const float* from, int64_t n, Dtype dtype) {
        const int64_t element = dtype == Dtype::f32 ? 4 : 2;
        Exact<unsigned char> x(n * element, static_cast<size_t>(element));
        for (int64_t i = 0; i < n; ++i)
            if (dtype == Dtype::f32)
                std::memcpy(x.data() + i * 4, from + i, 4);
            else {
                const uint16_t half = dtype == Dtype::bf16 ? bf16_of_float(from[i]) : fp16_of_float(from[i]);
                std::memcpy(x.data() + i * 2, &half, 2);
            }
        return x;
    }

  private:
    uint32_t state_;
};

[[noreturn]] inline void fail(const std::string& what) {
    std::printf("%s\n", what.c_str());
    std::fflush(stdout);
    std::exit(1);
}

// sqrt of the sum of (a - b)^2; b null: of a^2. NaN where one is not finite.
inline double distance(const float* a, const float* b, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) {
        const double d = b == nullptr ? a[i] : static_cast<double>(a[i]) - b[i];
        sum += d * d;
    }
    return std::sqrt(sum);
}

// Ends the program where a is farther than `bound` from b, or is not finite.
inline void expect_close(const float* a, const float* b, int64_t n, double bound, const std::string& what) {
    const double error = distance(a, b, n);
    if (!(error <= bound))
        fail(what + ": off by " + std::to_string(error) + ", more than " + std::to_string(bound));
}

} // namespace
} // namespace bitpalette
