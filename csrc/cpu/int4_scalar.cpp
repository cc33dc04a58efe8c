// The int4 kernel in plain C++: for machines without a vector set of their own here, and to test the others against.
#include "int4_body.h"

namespace bitpalette {
namespace {

struct Scalar {
    struct Floats {
        float lane[lanes];
    };
    struct Ints {
        int32_t lane[lanes];
    };
    struct Codes {
        uint8_t byte[64];
    };
    using Dot = Ints;
    static constexpr int64_t most_tokens = 2;

    // fp16 bits to float32: subnormals through a multiplication by 2^-24, which is exact
    static float half(uint16_t bits) {
        const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, magnitude = bits & 0x7FFF;
        float value;
        if (magnitude < 0x0400) {
            value = static_cast<float>(magnitude) * 0x1p-24f;
            uint32_t wide;
            std::memcpy(&wide, &value, sizeof wide);
            wide |= sign;
            std::memcpy(&value, &wide, sizeof value);
        } else {
            const uint32_t wide = sign | ((magnitude << 13) + (magnitude >= 0x7C00 ? 0x70000000u : 0x38000000u));
            std::memcpy(&value, &wide, sizeof value);
        }
        return value;
    }
    // float32 to fp16 bits, round to nearest even; overflow is infinity, NaN stays NaN
    static uint16_t to_half(float value) {
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        const uint32_t sign = bits >> 16 & 0x8000;
        bits &= 0x7FFFFFFF;
        if (bits > 0x7F800000)
            return static_cast<uint16_t>(sign | 0x7E00);
        if (bits >= 0x47800000)
            return static_cast<uint16_t>(sign | 0x7C00);
        if (bits < 0x38800000) { // subnormal: adding 0.5 leaves the value in units of 2^-24 in the low bits, rounded
            float magnitude;
            std::memcpy(&magnitude, &bits, sizeof magnitude);
            magnitude += 0.5f;
            uint32_t shifted;
            std::memcpy(&shifted, &magnitude, sizeof shifted);
            return static_cast<uint16_t>(sign | (shifted - 0x3F000000));
        }
        return static_cast<uint16_t>(sign | ((bits - 0x38000000 + 0x0FFF + (bits >> 13 & 1)) >> 13));
    }

    static Floats zero() { return {}; }
    static Floats load(const float* from) {
        Floats f;
        std::memcpy(f.lane, from, sizeof f.lane);
        return f;
    }
    static void store(float* to, const Floats& f) { std::memcpy(to, f.lane, sizeof f.lane); }
    static Floats load_halves(const uint16_t* from) {
        Floats f;
        for (int r = 0; r < lanes; ++r)
            f.lane[r] = half(from[r]);
        return f;
    }
    static void store_halves(uint16_t* to, const Floats& f) {
        for (int r = 0; r < lanes; ++r)
            to[r] = to_half(f.lane[r]);
    }
    static Floats scaled(Floats f, float by) {
        for (int r = 0; r < lanes; ++r)
            f.lane[r] *= by;
        return f;
    }
    static Floats multiply_add(const Floats& a, const Floats& b, Floats c) {
        for (int r = 0; r < lanes; ++r)
            c.lane[r] += a.lane[r] * b.lane[r];
        return c;
    }
    static Floats to_floats(const Ints& i) {
        Floats f;
        for (int r = 0; r < lanes; ++r)
            f.lane[r] = static_cast<float>(i.lane[r]);
        return f;
    }
    static Ints integer(int32_t value) {
        Ints i;
        for (int r = 0; r < lanes; ++r)
            i.lane[r] = value;
        return i;
    }
    static Ints load_bytes(const uint8_t* from) {
        Ints i;
        for (int r = 0; r < lanes; ++r)
            i.lane[r] = from[r];
        return i;
    }
    static Ints times(Ints i, int32_t by) {
        for (int r = 0; r < lanes; ++r)
            i.lane[r] *= by;
        return i;
    }
    static Codes load_codes(const uint8_t* from) {
        Codes c;
        std::memcpy(c.byte, from, sizeof c.byte);
        return c;
    }
    static Codes low(Codes c) {
        for (uint8_t& byte : c.byte)
            byte &= 15;
        return c;
    }
    static Codes high(Codes c) {
        for (uint8_t& byte : c.byte)
            byte >>= 4;
        return c;
    }
    static Dot start(const Ints& i) { return i; }
    static Dot add_products(Dot d, const Codes& c, const int8_t* input) {
        for (int r = 0; r < lanes; ++r)
            for (int k = 0; k < 4; ++k)
                d.lane[r] += c.byte[4 * r + k] * input[k];
        return d;
    }
    static Ints finish(const Dot& d) { return d; }
    static void decode_tile_row(const uint8_t* codes, float zero, float scale, float* to) {
        for (int step = 0; step < steps; ++step)
            for (int i = 0; i < 4; ++i) {
                const uint8_t byte = codes[step * 64 + i];
                to[8 * step + i] = (static_cast<float>(byte & 15) - zero) * scale;
                to[8 * step + 4 + i] = (static_cast<float>(byte >> 4) - zero) * scale;
            }
    }
};

} // namespace

const Int4Ops int4_scalar{quantize<Scalar>, linear<Scalar>, rows<Scalar>};

} // namespace bitpalette
