// Activations in portable code.
#include "activations_body.h"

namespace bitpalette {
namespace {

struct Scalar {
    static constexpr int lanes = 16;
    struct Floats {
        float of[lanes];
    };
    struct Ints {
        int32_t of[lanes];
    };

    template <Dtype D>
    static Floats load(const void* from, int64_t i) {
        Floats f;
        for (int j = 0; j < lanes; ++j)
            f.of[j] = load_element(from, D, i + j);
        return f;
    }
    static void store(float* to, Floats f) { std::memcpy(to, f.of, sizeof f.of); }
    template <Dtype D>
    static void store(void* to, int64_t i, Floats f) {
        for (int j = 0; j < lanes; ++j)
            store_element(to, D, i + j, f.of[j]);
    }
    static Floats times(Floats a, Floats b) {
        for (int j = 0; j < lanes; ++j)
            a.of[j] *= b.of[j];
        return a;
    }
    static Floats plus(Floats a, Floats b) {
        for (int j = 0; j < lanes; ++j)
            a.of[j] += b.of[j];
        return a;
    }

    static Ints integer(int32_t value) {
        Ints i;
        for (int j = 0; j < lanes; ++j)
            i.of[j] = value;
        return i;
    }
    static Ints plus(Ints a, Ints b) {
        for (int j = 0; j < lanes; ++j)
            a.of[j] += b.of[j];
        return a;
    }
    static Ints magnitude(Floats f) {
        Ints i;
        std::memcpy(i.of, f.of, sizeof i.of);
        for (int j = 0; j < lanes; ++j)
            i.of[j] &= 0x7FFFFFFF;
        return i;
    }
    static Ints largest(Ints a, Ints b) {
        for (int j = 0; j < lanes; ++j)
            a.of[j] = a.of[j] > b.of[j] ? a.of[j] : b.of[j];
        return a;
    }
    static int32_t largest_of(Ints i) {
        int32_t top = i.of[0];
        for (int j = 1; j < lanes; ++j)
            top = top > i.of[j] ? top : i.of[j];
        return top;
    }
    static int32_t sum_of(Ints i) {
        int32_t sum = 0;
        for (int j = 0; j < lanes; ++j)
            sum += i.of[j];
        return sum;
    }
    // 1.5 * 2^23 leaves no bits below one: the addition rounds to nearest even, for magnitudes below 2^22
    static Ints rounded(Floats f, float by) {
        Ints i;
        for (int j = 0; j < lanes; ++j) {
            const float scaled = f.of[j] * by;
            const float shifted = scaled + 12582912.0f;
            i.of[j] = static_cast<int32_t>(shifted - 12582912.0f);
        }
        return i;
    }
    static Ints shifted_right_8(Ints i) {
        for (int j = 0; j < lanes; ++j)
            i.of[j] >>= 8;
        return i;
    }
    static void store_bytes(int8_t* to, Ints i) {
        for (int j = 0; j < lanes; ++j)
            to[j] = static_cast<int8_t>(i.of[j]);
    }
};

} // namespace

const ActivationOps activations_scalar{load<Scalar>, quantize<Scalar>, store<Scalar>};

} // namespace bitpalette
