// The panel kernel in portable code.
#include "panel_gemm_body.h"

namespace bitpalette {
namespace {

struct Scalar {
    static constexpr int lanes = 16, blocks = 1, most_tokens = 2;
    static constexpr int top_byte = 255, chain = 1;
    struct Floats {
        float at[lanes];
    };
    struct Ints {
        uint32_t at[lanes]; // sums may wrap around on the way
    };

    static Floats all(float value) {
        return floats([&](int) { return value; });
    }
    static Floats load(const float* from) {
        return floats([&](int i) { return from[i]; });
    }
    static void store(float* to, const Floats& f) { std::memcpy(to, f.at, sizeof f.at); }
    static Floats multiply(const Floats& a, const Floats& b) {
        return floats([&](int i) { return a.at[i] * b.at[i]; });
    }
    static Floats multiply_add(const Floats& a, const Floats& b, const Floats& c) {
        return floats([&](int i) { return a.at[i] * b.at[i] + c.at[i]; });
    }
    static Floats to_floats(const Ints& n) {
        return floats([&](int i) { return static_cast<float>(static_cast<int32_t>(n.at[i])); });
    }
    static Floats load_float_words(const uint8_t* from) {
        Floats f;
        std::memcpy(f.at, from, sizeof f.at);
        return f;
    }
    static Floats all_float_words(const uint8_t* from) {
        float value;
        std::memcpy(&value, from, sizeof value);
        return all(value);
    }

    static Ints all_ints(int32_t value) {
        return ints([&](int) { return static_cast<uint32_t>(value); });
    }
    static Ints load_words(const uint8_t* from) {
        Ints n;
        std::memcpy(n.at, from, sizeof n.at);
        return n;
    }
    static Ints all_words(const uint8_t* from) {
        uint32_t word;
        std::memcpy(&word, from, sizeof word);
        return ints([&](int) { return word; });
    }
    static void add_products(Ints& sum, const Ints& w, const Ints& x, Shorts) {
        for (int i = 0; i < lanes; ++i) {
            const int32_t low = static_cast<int16_t>(w.at[i]) * static_cast<int16_t>(x.at[i]);
            const int32_t high = static_cast<int16_t>(w.at[i] >> 16) * static_cast<int16_t>(x.at[i] >> 16);
            sum.at[i] += static_cast<uint32_t>(low) + static_cast<uint32_t>(high);
        }
    }

    static void add_products(Ints& sum, const Ints& w, const Ints& x, Bytes) {
        for (int i = 0; i < lanes; ++i)
            for (int bit = 0; bit < 32; bit += 8)
                sum.at[i] += (w.at[i] >> bit & 255) * static_cast<uint32_t>(static_cast<int8_t>(x.at[i] >> bit));
    }

    static Ints minus(const Ints& a, const Ints& b) {
        return ints([&](int i) { return a.at[i] - b.at[i]; });
    }
    static Ints lowest(const Ints& words, Bytes) {
        return ints([&](int i) { return words.at[i] & 255; });
    }
    static Ints lowest(const Ints& words, Shorts) {
        return ints([&](int i) { return static_cast<uint32_t>(static_cast<int16_t>(words.at[i])); });
    }
    static Ints next(const Ints& words, Bytes) {
        return ints([&](int i) { return words.at[i] >> 8; });
    }
    static Ints next(const Ints& words, Shorts) {
        return ints([&](int i) { return words.at[i] >> 16; });
    }

    static void interleave(const uint8_t* const (&rows)[panel_rows], int64_t n, uint8_t* to) {
        for (int64_t i = 0; i < n; ++i)
            for (int r = 0; r < panel_rows; ++r)
                std::memcpy(to + i * panel_step_bytes + 4 * r, rows[r] + 4 * i, 4);
    }
    static void widen(const uint8_t* from, int64_t n, uint8_t* to) {
        for (int64_t i = 0; i < n; ++i, from += panel_step_bytes)
            for (int half = 0; half < 2; ++half, to += panel_step_bytes) {
                uint16_t step[2 * panel_rows];
                for (int j = 0; j < 2 * panel_rows; ++j)
                    step[j] = from[j / 2 * 4 + 2 * half + j % 2];
                std::memcpy(to, step, sizeof step);
            }
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
};

} // namespace

const PanelUnit panel_scalar = panel_of<Scalar>();

} // namespace bitpalette
