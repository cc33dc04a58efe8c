// Float32 lanes in portable code: arrays of 8, in loops that a compiler turns into the vectors of its baseline.
#pragma once

#include "float_lanes.h"
#include "half.h"

namespace bitpalette {
namespace {

struct Scalar {
    static constexpr int lanes = 8;
    static constexpr int registers = 16;
    struct Floats {
        float at[lanes];
    };

    static Floats zero() { return all(0); }
    static Floats all(float value) {
        Floats f;
        for (float& x : f.at)
            x = value;
        return f;
    }
    static Floats add(Floats a, const Floats& b) {
        for (int i = 0; i < lanes; ++i)
            a.at[i] += b.at[i];
        return a;
    }
    static Floats subtract(Floats a, const Floats& b) {
        for (int i = 0; i < lanes; ++i)
            a.at[i] -= b.at[i];
        return a;
    }
    static Floats multiply(Floats a, const Floats& b) {
        for (int i = 0; i < lanes; ++i)
            a.at[i] *= b.at[i];
        return a;
    }
    static Floats divide(Floats a, const Floats& b) {
        for (int i = 0; i < lanes; ++i)
            a.at[i] /= b.at[i];
        return a;
    }
    static Floats multiply_add(Floats a, const Floats& b, const Floats& c) {
        for (int i = 0; i < lanes; ++i)
            a.at[i] = a.at[i] * b.at[i] + c.at[i];
        return a;
    }
    // b where one of the two is NaN
    static Floats minimum(Floats a, const Floats& b) {
        for (int i = 0; i < lanes; ++i)
            a.at[i] = a.at[i] < b.at[i] ? a.at[i] : b.at[i];
        return a;
    }
    static Floats maximum(Floats a, const Floats& b) {
        for (int i = 0; i < lanes; ++i)
            a.at[i] = a.at[i] > b.at[i] ? a.at[i] : b.at[i];
        return a;
    }
    static float total(Floats f) {
        for (int width = lanes / 2; width > 0; width /= 2)
            for (int i = 0; i < width; ++i)
                f.at[i] += f.at[i + width];
        return f.at[0];
    }
    // total(f[i]) at lane i
    static Floats totals(const Floats (&f)[lanes]) {
        Floats sums;
        for (int i = 0; i < lanes; ++i)
            sums.at[i] = total(f[i]);
        return sums;
    }
    static float largest(const Floats& f) {
        float most = f.at[0];
        for (const float x : f.at)
            most = x > most ? x : most;
        return most;
    }
    // y * 2^n for the n in the low bits of `shifted`: added to y's exponent
    static Floats times_power_of_two(Floats y, const Floats& shifted) {
        for (int i = 0; i < lanes; ++i)
            y.at[i] = float_of_bits(bits_of_float(y.at[i]) + (bits_of_float(shifted.at[i]) << 23));
        return y;
    }

    template <class T>
    static Floats load(const T* from) {
        return load(from, lanes);
    }
    // the first n of 8, 0 for the others
    template <class T>
    static Floats load(const T* from, int n) {
        Floats f{};
        for (int i = 0; i < n; ++i)
            f.at[i] = widen(from[i]);
        return f;
    }
    static void store(float* to, const Floats& f) { store(to, f, lanes); }
    static void store(float* to, const Floats& f, int n) {
        for (int i = 0; i < n; ++i)
            to[i] = f.at[i];
    }

  private:
    static float widen(float x) { return x; }
    static float widen(Bf16 x) { return float_of_bf16(x.bits); }
    static float widen(Fp16 x) { return float_of_fp16(x.bits); }
};

} // namespace
} // namespace bitpalette
