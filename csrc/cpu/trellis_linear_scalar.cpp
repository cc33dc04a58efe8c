// The trellis kernel in plain loops, for every machine: a tile's row is an array of eight 32-bit words.
#include "trellis_linear_body.h"

namespace bitpalette {
namespace {

struct Scalar {
    static constexpr int lanes = trellis_pairs, rows = 1;
    static constexpr bool byte_products = false;
    template <class T>
    struct Lanes {
        T at[lanes];
    };
    using Floats = Lanes<float>;
    using Ints = Lanes<uint32_t>;

    static Floats all(float value) {
        return each<float>([&](int) { return value; });
    }
    static Floats load(const float* from) {
        return each<float>([&](int i) { return from[i]; });
    }
    static void store(float* to, Floats f) { std::memcpy(to, f.at, sizeof f.at); }
    static Floats multiply_add(Floats a, Floats b, Floats c) {
        return each<float>([&](int i) { return a.at[i] * b.at[i] + c.at[i]; });
    }
    static Floats to_floats(Ints a) {
        return each<float>([&](int i) { return static_cast<float>(static_cast<int32_t>(a.at[i])); });
    }
    static void row_totals(Floats f, float* to) {
        for (int width = lanes / 2; width > 0; width /= 2)
            for (int i = 0; i < width; ++i)
                f.at[i] += f.at[i + width];
        *to = f.at[0];
    }
    static Ints shorts(uint16_t value) {
        return each<uint32_t>([&](int) { return value * 0x10001u; });
    }
    static Ints load_row(const void* from) {
        Ints i;
        std::memcpy(i.at, from, sizeof i.at);
        return i;
    }
    static Ints load_aligned(const void* from) { return load_row(from); }
    static Ints load_pairs(const int32_t* from) { return load_row(from); }
    // The first byte picked says where the others are; what lies beyond the piece is in no window.
    static Ints bytes(const uint8_t* const* pieces, const Ints& pick) {
        uint8_t padded[trellis_piece + 4] = {};
        std::memcpy(padded, pieces[0], trellis_piece);
        return each<uint32_t>([&](int i) {
            const uint8_t* from = padded + (pick.at[i] & 15);
            return from[0] | static_cast<uint32_t>(from[1]) << 8 | static_cast<uint32_t>(from[2]) << 16 |
                   static_cast<uint32_t>(from[3]) << 24;
        });
    }
    static Ints shift_right(Ints a, Ints by) {
        return each<uint32_t>([&](int i) { return a.at[i] >> by.at[i]; });
    }
    static Ints shift_left(Ints a, Ints by) {
        return each<uint32_t>([&](int i) { return a.at[i] << by.at[i]; });
    }
    static Ints odd_halves(Ints even, Ints odd) {
        return each<uint32_t>([&](int i) { return (even.at[i] & 0xffff) | (odd.at[i] & 0xffff0000); });
    }
    static Ints both(Ints a, Ints b) {
        return each<uint32_t>([&](int i) { return a.at[i] & b.at[i]; });
    }
    static Ints times(Ints a, Ints b) {
        return halves(a, b, [](uint32_t x, uint32_t y) { return x * y; });
    }
    static Ints times_high(Ints a, Ints b) {
        return halves(a, b, [](uint32_t x, uint32_t y) { return x * y >> 16; });
    }
    static Ints add_shorts(Ints a, Ints b) {
        return halves(a, b, [](uint32_t x, uint32_t y) { return x + y; });
    }
    static Ints byte_pairs(Ints a) {
        return each<uint32_t>([&](int i) { return (a.at[i] & 0xff00ff) + (a.at[i] >> 8 & 0xff00ff); });
    }
    static Ints add_products(Ints sum, Ints a, Ints b) {
        return each<uint32_t>([&](int i) {
            const int32_t low = static_cast<int16_t>(a.at[i]) * static_cast<int16_t>(b.at[i]);
            const int32_t high = static_cast<int16_t>(a.at[i] >> 16) * static_cast<int16_t>(b.at[i] >> 16);
            return sum.at[i] + static_cast<uint32_t>(low) + static_cast<uint32_t>(high);
        });
    }
    static void store_weights(Ints level, float scale, float* to) {
        for (int i = 0; i < trellis_side; ++i)
            to[i] = static_cast<float>(static_cast<int>(level.at[i / 2] >> (i % 2 * 16) & 0xffff) - 510) * scale;
    }

  private:
    template <class T, class F>
    static Lanes<T> each(F f) {
        Lanes<T> result;
        for (int i = 0; i < lanes; ++i)
            result.at[i] = f(i);
        return result;
    }
    template <class F>
    static Ints halves(Ints a, Ints b, F f) {
        return each<uint32_t>([&](int i) {
            return (f(a.at[i] & 0xffff, b.at[i] & 0xffff) & 0xffff) | f(a.at[i] >> 16, b.at[i] >> 16) << 16;
        });
    }
};

} // namespace

const TrellisLinearUnit trellis_linear_scalar{multiply<Scalar>, decode<Scalar>, unpack<Scalar>};

} // namespace bitpalette
