// Input transforms in portable code: four lanes, which compilers make a register of where there is one.
#include "input_transform_body.h"

namespace bitpalette {
namespace {

struct Scalar {
    struct Floats {
        float of[4];
    };
    static constexpr int lanes = 4, registers = 4, columns = 1;

    static Floats zero() { return {}; }
    static Floats all(float value) { return {{value, value, value, value}}; }
    static Floats load(const float* from) { return {{from[0], from[1], from[2], from[3]}}; }
    static void store(float* to, Floats f) { std::memcpy(to, f.of, sizeof f.of); }
    static Floats plus(Floats a, Floats b) {
        for (int j = 0; j < lanes; ++j)
            a.of[j] += b.of[j];
        return a;
    }
    static Floats minus(Floats a, Floats b) {
        for (int j = 0; j < lanes; ++j)
            a.of[j] -= b.of[j];
        return a;
    }
    static Floats times(Floats a, Floats b) {
        for (int j = 0; j < lanes; ++j)
            a.of[j] *= b.of[j];
        return a;
    }
    static Floats multiply_add(Floats a, Floats b, Floats c) {
        for (int j = 0; j < lanes; ++j)
            c.of[j] += a.of[j] * b.of[j];
        return c;
    }
    // lane j: f[j] + f[j ^ Stride] where the bit of j is clear, f[j ^ Stride] - f[j] where it is set
    template <int Stride>
    static Floats butterfly(Floats f) {
        const float a = f.of[0], b = f.of[1], c = f.of[2], d = f.of[3];
        if constexpr (Stride == 1)
            return {{a + b, a - b, c + d, c - d}};
        else
            return {{a + c, b + d, a - c, b - d}};
    }
};

} // namespace

const TransformOps transform_scalar{multiply<Scalar>, hadamard<Scalar>, odd<Scalar>, gather<Scalar>};

} // namespace bitpalette
