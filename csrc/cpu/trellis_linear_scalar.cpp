// The trellis kernel in plain loops, for every machine: a tile's row is an array.
#include "trellis_linear_body.h"

namespace bitpalette {
namespace {

struct Scalar {
    static constexpr int lanes = trellis_side, parts = 1;
    static constexpr int most_chained = 0;
    template <class T>
    struct Lanes {
        T at[lanes];
    };
    using Floats = Lanes<float>;
    using Ints = Lanes<uint32_t>;

    static Floats zero() { return {}; }
    static Floats all(float value) {
        return each<float>([&](int) { return value; });
    }
    static Floats load(const float* from) {
        return each<float>([&](int i) { return from[i]; });
    }
    static void store(float* to, Floats f) { std::copy(f.at, f.at + lanes, to); }
    static Floats add(Floats a, Floats b) {
        return each<float>([&](int i) { return a.at[i] + b.at[i]; });
    }
    static Floats multiply(Floats a, Floats b) {
        return each<float>([&](int i) { return a.at[i] * b.at[i]; });
    }
    static Floats multiply_add(Floats a, Floats b, Floats c) {
        return each<float>([&](int i) { return a.at[i] * b.at[i] + c.at[i]; });
    }
    static float total(Floats f) {
        for (int width = lanes / 2; width > 0; width /= 2)
            for (int i = 0; i < width; ++i)
                f.at[i] += f.at[i + width];
        return f.at[0];
    }
    static Ints integer(uint32_t value) {
        return each<uint32_t>([&](int) { return value; });
    }
    static Ints load_ints(const void* from) {
        Ints i;
        std::memcpy(i.at, from, sizeof i.at);
        return i;
    }
    static Ints both(Ints a, Ints b) {
        return each<uint32_t>([&](int i) { return a.at[i] & b.at[i]; });
    }
    static Ints shift_right(Ints a, Ints by) {
        return each<uint32_t>([&](int i) { return a.at[i] >> by.at[i]; });
    }
    static Ints times(Ints a, Ints b) {
        return each<uint32_t>([&](int i) { return a.at[i] * b.at[i]; });
    }
    static Ints bytes(const uint8_t* piece, const Ints& pick) {
        const auto byte = [&](uint32_t p) { return p & 0x80 ? 0u : piece[p & 15]; };
        return each<uint32_t>([&](int i) {
            return byte(pick.at[i] & 0xff) | byte(pick.at[i] >> 8 & 0xff) << 8 | byte(pick.at[i] >> 16 & 0xff) << 16;
        });
    }
    static Floats level(Ints product) {
        return each<float>([&](int i) {
            const uint32_t p = product.at[i], pairs = (p & 0xff00ff) + (p >> 8 & 0xff00ff);
            return static_cast<float>(static_cast<int>((pairs & 0xffff) + (pairs >> 16)) - 510);
        });
    }

  private:
    template <class T, class F>
    static Lanes<T> each(F f) {
        Lanes<T> result;
        for (int i = 0; i < lanes; ++i)
            result.at[i] = f(i);
        return result;
    }
};

} // namespace

const TrellisLinearUnit trellis_linear_scalar{linear<Scalar>, decode<Scalar>};

} // namespace bitpalette
