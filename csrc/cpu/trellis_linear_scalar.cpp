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
    // The first byte picked says where the other two are; what a window has no bits in is masked out afterwards.
    static Ints bytes(const uint8_t* piece, const Ints& pick) {
        uint8_t padded[trellis_piece + 4] = {};
        std::memcpy(padded, piece, trellis_piece);
        return each<uint32_t>([&](int i) {
            const uint8_t* from = padded + (pick.at[i] & 15);
            return from[0] | static_cast<uint32_t>(from[1]) << 8 | static_cast<uint32_t>(from[2]) << 16 |
                   static_cast<uint32_t>(from[3]) << 24;
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
