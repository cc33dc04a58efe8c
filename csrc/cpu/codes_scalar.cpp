// The code-plane kernel in plain C++: for machines without a vector set of their own here, and to test the others
// against.
#include "codes_body.h"

namespace bitpalette {
namespace {

struct Scalar {
    template <class T, int n>
    struct Array {
        T at[n];
    };
    using Floats = Array<float, lanes>;
    using Ints = Array<int32_t, lanes>;
    using Codes = Array<uint8_t, codes_plane_bytes>;
    using Dot = Ints;
    using Table = Floats;
    using Row = Array<uint8_t, codes_tile_columns>;
    static constexpr int table_offset = 128;
    static constexpr bool shifts_bytes = true;
    static constexpr int most_tokens = 1; // it is not about speed, and each count takes seconds to compile
    static constexpr int most_sums = 1;

    static Floats zero() { return {}; }
    static Floats all(float value) {
        return floats([&](int) { return value; });
    }
    static Floats load(const float* from) {
        return floats([&](int i) { return from[i]; });
    }
    static void store(float* to, const Floats& f) { std::memcpy(to, f.at, sizeof f.at); }
    static Floats load_halves(const uint16_t* from) {
        return floats([&](int i) { return float_of_fp16(from[i]); });
    }
    static Floats scaled(const Floats& f, float by) {
        return floats([&](int i) { return f.at[i] * by; });
    }
    static Floats add(const Floats& a, const Floats& b) {
        return floats([&](int i) { return a.at[i] + b.at[i]; });
    }
    static Floats multiply(const Floats& a, const Floats& b) {
        return floats([&](int i) { return a.at[i] * b.at[i]; });
    }
    static Floats multiply_add(const Floats& a, const Floats& b, const Floats& c) {
        return floats([&](int i) { return a.at[i] * b.at[i] + c.at[i]; });
    }
    static float total(Floats f) {
        for (int width = lanes / 2; width > 0; width /= 2)
            for (int i = 0; i < width; ++i)
                f.at[i] += f.at[i + width];
        return f.at[0];
    }
    static Floats to_floats(const Ints& n) {
        return floats([&](int i) { return static_cast<float>(n.at[i]); });
    }
    static Ints integer(int32_t value) {
        return ints([&](int) { return value; });
    }
    static Ints load_bytes(const uint8_t* from) {
        return ints([&](int i) { return from[i]; });
    }
    static Ints times(const Ints& n, int32_t by) {
        return ints([&](int i) { return n.at[i] * by; });
    }

    static Codes load_codes(const uint8_t* from) {
        return codes([&](int i) { return from[i]; });
    }
    static Codes load_sixteen(const uint8_t* from) {
        return codes([&](int i) { return from[i % 16]; });
    }
    static Codes table_bytes(const Codes& c) { return c; }
    template <int n>
    static Codes shift(const Codes& c) {
        return codes([&](int i) { return n > 0 ? c.at[i] >> n : c.at[i] << -n; });
    }
    static Codes masked(const Codes& c, int mask) {
        return codes([&](int i) { return c.at[i] & mask; });
    }
    static Codes merged(const Codes& a, const Codes& c, int mask) {
        return codes([&](int i) { return a.at[i] | (c.at[i] & mask); });
    }
    static Codes shuffle(const Codes& table, const Codes& index) {
        return codes([&](int i) { return table.at[i / 16 * 16 + index.at[i]]; });
    }
    template <int bit>
    static Codes choose(const Codes& code, const Codes& clear, const Codes& set) {
        return codes([&](int i) { return code.at[i] >> bit & 1 ? set.at[i] : clear.at[i]; });
    }

    static Dot start(const Ints& n) { return n; }
    template <int top, int k>
    static void add_products(Dot& d, const Codes& c, const int8_t* input) {
        for (int r = 0; r < lanes; ++r)
            for (int i = 0; i < 4; ++i)
                d.at[r] += c.at[4 * r + i] * input[i];
    }
    static Ints finish(const Dot& d) { return d; }
    static Ints combined(const Ints& high, const Ints& low) {
        return ints([&](int i) { return high.at[i] * 256 + low.at[i]; });
    }

    static Table load_table(const float* from) { return load(from); }
    template <int i>
    static Floats look_up(const Table& table, const Codes& c) {
        return floats([&](int r) { return table.at[c.at[4 * r + i]]; });
    }
    template <int i, int top>
    static Floats number(const Codes& c) {
        return floats([&](int r) { return static_cast<float>(c.at[4 * r + i]); });
    }

    // at: the row's four bytes in the first register of a tile.
    template <int bits>
    static Row row_codes(const uint8_t* at) {
        constexpr int pairs = bits & 4, singles = bits - 1; // registers before the 2-bit and the 1-bit plane
        Row row;
        for (int k = 0; k < 8; ++k)
            for (int i = 0; i < 4; ++i) {
                const auto byte = [&](int index) { return at[codes_plane_bytes * index + i]; };
                int code = 0;
                if constexpr (bits == 8)
                    code = byte(k);
                if constexpr (bits < 8 && (bits & 4) != 0)
                    code = byte(k / 2) >> 4 * (k % 2) & 15;
                if constexpr (bits < 8 && (bits & 2) != 0)
                    code |= (byte(pairs + k / 4) >> 2 * (k % 4) & 3) << pairs;
                if constexpr (bits < 8 && (bits & 1) != 0)
                    code |= (byte(singles) >> k & 1) << singles;
                row.at[4 * k + i] = static_cast<uint8_t>(code);
            }
        return row;
    }
    static void write_numbers(const Row& row, float zero, float scale, float* to) {
        for (int i = 0; i < codes_tile_columns; ++i)
            to[i] = (static_cast<float>(row.at[i]) - zero) * scale;
    }
    static void write_levels(const Row& row, const Table& table, float scale, float* to) {
        for (int i = 0; i < codes_tile_columns; ++i)
            to[i] = table.at[row.at[i]] * scale;
    }

  private:
    template <class F>
    static Floats floats(F f) {
        Floats result;
        for (int i = 0; i < lanes; ++i)
            result.at[i] = f(i);
        return result;
    }
    template <class F>
    static Ints ints(F f) {
        Ints result;
        for (int i = 0; i < lanes; ++i)
            result.at[i] = f(i);
        return result;
    }
    template <class F>
    static Codes codes(F f) {
        Codes result;
        for (int i = 0; i < codes_plane_bytes; ++i)
            result.at[i] = static_cast<uint8_t>(f(i));
        return result;
    }
};

} // namespace

CodesFunctions codes_scalar(const CodesView& w, InputForm form) {
    return choose_functions<Scalar>(w, form);
}

} // namespace bitpalette
