// The kernel for bytes in canonical layout in plain C++.
#include "int8_body.h"

namespace bitpalette {
namespace {

struct Scalar {
    static constexpr int columns = 32, lanes = 8, most_rows = 1, most_tokens = 2;
    template <class T, int n>
    struct Array {
        T at[n];
    };
    using Floats = Array<float, lanes>;
    using Ints = Array<int32_t, lanes>;
    using Codes = Array<uint8_t, columns>;
    using Input = Array<int8_t, columns>;

    static Floats zero() { return {}; }
    static Floats load(const float* from) { return copy<Floats>(from); }
    static Floats multiply_add(const Floats& a, const Floats& b, Floats c) {
        for (int i = 0; i < lanes; ++i)
            c.at[i] += a.at[i] * b.at[i];
        return c;
    }
    static float total(Floats f) {
        for (int width = lanes / 2; width > 0; width /= 2)
            for (int i = 0; i < width; ++i)
                f.at[i] += f.at[i + width];
        return f.at[0];
    }
    static Floats to_floats(const Ints& n) {
        Floats f;
        for (int i = 0; i < lanes; ++i)
            f.at[i] = static_cast<float>(n.at[i]);
        return f;
    }
    static Ints no_ints() { return {}; }
    static Ints load_ints(const int32_t* from) { return copy<Ints>(from); }
    static Codes load_codes(const uint8_t* from) { return copy<Codes>(from); }
    static Input load_input(const int8_t* from) { return copy<Input>(from); }
    static Ints add_products(Ints sums, const Codes& c, const Input& x) {
        for (int i = 0; i < columns; ++i)
            sums.at[i / int8_quad_columns] += c.at[i] * x.at[i];
        return sums;
    }
    static Ints combined(Ints high, const Ints& low) {
        for (int i = 0; i < lanes; ++i)
            high.at[i] = 256 * high.at[i] + low.at[i];
        return high;
    }
    static Floats levels(const uint8_t* from) {
        Floats f;
        for (int i = 0; i < lanes; ++i)
            f.at[i] = static_cast<float>(static_cast<int8_t>(from[i] ^ 0x80));
        return f;
    }

  private:
    template <class Array, class T>
    static Array copy(const T* from) {
        Array array;
        std::memcpy(array.at, from, sizeof array.at);
        return array;
    }
};

} // namespace

const Int8Unit int8_scalar = int8_unit<Scalar>();

} // namespace bitpalette
