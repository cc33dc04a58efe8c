// The code-plane kernel for NEON with dot product: 16 lanes are four registers.
//
// The dot product takes signed bytes on both sides. Codes below 128 are the same either way, tables are loaded less 128
// (table_offset), and codes of 8 bits are multiplied less 128, which 128 times the sum of the input brings back.
#include "codes_body.h"

#if BITPALETTE_AARCH64
#include <arm_neon.h>

namespace bitpalette {
namespace {

struct Neon {
    struct Floats {
        float32x4_t a, b, c, d; // rows 0..3, 4..7, 8..11, 12..15
    };
    struct Ints {
        int32x4_t a, b, c, d;
    };
    struct Codes {
        uint8x16_t a, b, c, d;
    };
    struct Dot {
        Ints sums;
        int32x4_t inputs; // sum of the input, where codes have 8 bits
    };
    using Table = uint8x16x4_t; // 16 floats, as bytes
    struct Row {
        uint8x16_t a, b; // a column each
    };
    static constexpr int most_tokens = 4; // 8 need 32 registers for their sums alone
    static constexpr int most_sums = 2;
    static constexpr int table_offset = 0;
    static constexpr bool shifts_bytes = true;

    static Floats zero() { return all(0); }
    static Floats all(float value) {
        const float32x4_t four = vdupq_n_f32(value);
        return {four, four, four, four};
    }
    static Floats load(const float* from) {
        return {vld1q_f32(from), vld1q_f32(from + 4), vld1q_f32(from + 8), vld1q_f32(from + 12)};
    }
    static void store(float* to, Floats f) {
        vst1q_f32(to, f.a);
        vst1q_f32(to + 4, f.b);
        vst1q_f32(to + 8, f.c);
        vst1q_f32(to + 12, f.d);
    }
    static Floats load_halves(const uint16_t* from) {
        const float16x8_t low = vreinterpretq_f16_u16(vld1q_u16(from)),
                          high = vreinterpretq_f16_u16(vld1q_u16(from + 8));
        return {vcvt_f32_f16(vget_low_f16(low)), vcvt_high_f32_f16(low), vcvt_f32_f16(vget_low_f16(high)),
                vcvt_high_f32_f16(high)};
    }
    static Floats scaled(Floats f, float by) {
        return {vmulq_n_f32(f.a, by), vmulq_n_f32(f.b, by), vmulq_n_f32(f.c, by), vmulq_n_f32(f.d, by)};
    }
    static Floats add(Floats x, Floats y) {
        return {vaddq_f32(x.a, y.a), vaddq_f32(x.b, y.b), vaddq_f32(x.c, y.c), vaddq_f32(x.d, y.d)};
    }
    static Floats multiply(Floats x, Floats y) {
        return {vmulq_f32(x.a, y.a), vmulq_f32(x.b, y.b), vmulq_f32(x.c, y.c), vmulq_f32(x.d, y.d)};
    }
    static Floats multiply_add(Floats x, Floats y, Floats z) {
        return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b), vfmaq_f32(z.c, x.c, y.c), vfmaq_f32(z.d, x.d, y.d)};
    }
    static float total(Floats f) {
        const float32x4_t four = vaddq_f32(vaddq_f32(f.a, f.c), vaddq_f32(f.b, f.d));
        return vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)));
    }
    static Floats to_floats(Ints i) {
        return {vcvtq_f32_s32(i.a), vcvtq_f32_s32(i.b), vcvtq_f32_s32(i.c), vcvtq_f32_s32(i.d)};
    }
    static Ints integer(int32_t value) {
        const int32x4_t four = vdupq_n_s32(value);
        return {four, four, four, four};
    }
    static Ints load_bytes(const uint8_t* from) { return widened(vld1q_u8(from)); }
    static Ints times(Ints i, int32_t by) {
        return {vmulq_n_s32(i.a, by), vmulq_n_s32(i.b, by), vmulq_n_s32(i.c, by), vmulq_n_s32(i.d, by)};
    }

    static Codes load_codes(const uint8_t* from) {
        return {vld1q_u8(from), vld1q_u8(from + 16), vld1q_u8(from + 32), vld1q_u8(from + 48)};
    }
    static Codes load_sixteen(const uint8_t* from) {
        const uint8x16_t table = vld1q_u8(from);
        return {table, table, table, table};
    }
    static Codes table_bytes(Codes c) { return each(c, centred); }
    template <int n>
    static Codes shift(Codes c) {
        if constexpr (n > 0)
            return each(c, [](uint8x16_t x) { return vshrq_n_u8(x, n); });
        else if constexpr (n < 0)
            return each(c, [](uint8x16_t x) { return vshlq_n_u8(x, -n); });
        else
            return c;
    }
    static Codes masked(Codes c, int mask) {
        const uint8x16_t bits = vdupq_n_u8(static_cast<uint8_t>(mask));
        return {vandq_u8(c.a, bits), vandq_u8(c.b, bits), vandq_u8(c.c, bits), vandq_u8(c.d, bits)};
    }
    static Codes merged(Codes x, Codes c, int mask) {
        const Codes part = masked(c, mask);
        return {vorrq_u8(x.a, part.a), vorrq_u8(x.b, part.b), vorrq_u8(x.c, part.c), vorrq_u8(x.d, part.d)};
    }
    static Codes shuffle(Codes table, Codes index) {
        return {vqtbl1q_u8(table.a, index.a), vqtbl1q_u8(table.b, index.b), vqtbl1q_u8(table.c, index.c),
                vqtbl1q_u8(table.d, index.d)};
    }
    template <int bit>
    static Codes choose(Codes code, Codes clear, Codes set) {
        const uint8x16_t bits = vdupq_n_u8(1 << bit);
        return {vbslq_u8(vtstq_u8(code.a, bits), set.a, clear.a), vbslq_u8(vtstq_u8(code.b, bits), set.b, clear.b),
                vbslq_u8(vtstq_u8(code.c, bits), set.c, clear.c), vbslq_u8(vtstq_u8(code.d, bits), set.d, clear.d)};
    }

    static Dot start(Ints i) { return {i, vdupq_n_s32(0)}; }
    // Four columns of the 16 in a register of input meet all rows: no broadcast.
    template <int top, int k>
    static void add_products(Dot& d, Codes c, const int8_t* input) {
        constexpr int four = k % 4;
        const int8x16_t x = vld1q_s8(input - 4 * four);
        if constexpr (top > 127) {
            c = each(c, centred);
            if constexpr (four == 0) // 16 columns at once
                d.inputs = vdotq_s32(d.inputs, vdupq_n_s8(1), x);
        }
        d.sums.a = vdotq_laneq_s32(d.sums.a, vreinterpretq_s8_u8(c.a), x, four);
        d.sums.b = vdotq_laneq_s32(d.sums.b, vreinterpretq_s8_u8(c.b), x, four);
        d.sums.c = vdotq_laneq_s32(d.sums.c, vreinterpretq_s8_u8(c.c), x, four);
        d.sums.d = vdotq_laneq_s32(d.sums.d, vreinterpretq_s8_u8(c.d), x, four);
        if constexpr (top > 127 && k == 7) {
            const int32x4_t all = vdupq_n_s32(vaddvq_s32(d.inputs) * 128);
            d.sums = {vaddq_s32(d.sums.a, all), vaddq_s32(d.sums.b, all), vaddq_s32(d.sums.c, all),
                      vaddq_s32(d.sums.d, all)};
        }
    }
    static Ints finish(const Dot& d) { return d.sums; }
    static Ints combined(Ints high, Ints low) {
        return {vmlaq_n_s32(low.a, high.a, 256), vmlaq_n_s32(low.b, high.b, 256), vmlaq_n_s32(low.c, high.c, 256),
                vmlaq_n_s32(low.d, high.d, 256)};
    }

    static Table load_table(const float* from) {
        const auto bytes = [&](int i) { return vreinterpretq_u8_f32(vld1q_f32(from + i)); };
        return {{bytes(0), bytes(4), bytes(8), bytes(12)}};
    }
    template <int i>
    static Floats look_up(const Table& table, Codes c) {
        const uint8x16_t at = {i,      i,      i,      i,     4 + i, 4 + i, 4 + i, 4 + i, 8 + i, 8 + i, 8 + i, 8 + i, //
                               12 + i, 12 + i, 12 + i, 12 + i};
        const auto level = [&](uint8x16_t codes) { return looked_up(table, vqtbl1q_u8(vshlq_n_u8(codes, 2), at)); };
        return {level(c.a), level(c.b), level(c.c), level(c.d)};
    }
    template <int i, int top>
    static Floats number(Codes c) {
        const uint8x16_t at = {i, 255, 255, 255, 4 + i, 255, 255, 255, 8 + i, 255, 255, 255, 12 + i, 255, 255, 255};
        const auto number = [&](uint8x16_t codes) {
            return vcvtq_f32_u32(vreinterpretq_u32_u8(vqtbl1q_u8(codes, at))); // 0 for an index of 255
        };
        return {number(c.a), number(c.b), number(c.c), number(c.d)};
    }

    // at: the row's four bytes in the first register of a tile.
    template <int bits>
    static Row row_codes(const uint8_t* at) {
        if constexpr (bits == 8)
            return {pieces(at, 0, 1, 2, 3), pieces(at, 4, 5, 6, 7)};
        Row row = {vdupq_n_u8(0), vdupq_n_u8(0)};
        if constexpr (bits & 4) {
            const int8x16_t by = shifts(0, -4, 0, -4);
            row = {part(pieces(at, 0, 0, 1, 1), by, 15), part(pieces(at, 2, 2, 3, 3), by, 15)};
        }
        if constexpr (bits & 2) {
            constexpr int first = bits & 4;
            const int8x16_t by = shifts(0, -2, -4, -6);
            row = {vorrq_u8(row.a, vshlq_n_u8(part(pieces(at, first, first, first, first), by, 3), first)),
                   vorrq_u8(row.b,
                            vshlq_n_u8(part(pieces(at, first + 1, first + 1, first + 1, first + 1), by, 3), first))};
        }
        if constexpr (bits & 1) {
            constexpr int last = bits - 1;
            const uint8x16_t plane = pieces(at, last, last, last, last);
            row = {vorrq_u8(row.a, vshlq_n_u8(part(plane, shifts(0, -1, -2, -3), 1), last)),
                   vorrq_u8(row.b, vshlq_n_u8(part(plane, shifts(-4, -5, -6, -7), 1), last))};
        }
        return row;
    }
    static void write_numbers(Row row, float zero, float scale, float* to) {
        for (int half = 0; half < 2; ++half) {
            const Floats codes = to_floats(widened(half == 0 ? row.a : row.b));
            const float32x4_t z = vdupq_n_f32(zero);
            store(to + 16 * half,
                  scaled({vsubq_f32(codes.a, z), vsubq_f32(codes.b, z), vsubq_f32(codes.c, z), vsubq_f32(codes.d, z)},
                         scale));
        }
    }
    static void write_levels(Row row, const Table& table, float scale, float* to) {
        for (int half = 0; half < 2; ++half) {
            const uint8x16_t first = vshlq_n_u8(half == 0 ? row.a : row.b, 2); // byte of an entry
            const uint8x16_t low = vzip1q_u8(first, first), high = vzip2q_u8(first, first);
            const auto levels = [&](uint8x16_t twice) { return looked_up(table, twice); };
            store(to + 16 * half, scaled({levels(vzip1q_u8(low, low)), levels(vzip2q_u8(low, low)),
                                          levels(vzip1q_u8(high, high)), levels(vzip2q_u8(high, high))},
                                         scale));
        }
    }

  private:
    template <class F>
    static Codes each(Codes c, F f) {
        return {f(c.a), f(c.b), f(c.c), f(c.d)};
    }
    static uint8x16_t centred(uint8x16_t c) { return veorq_u8(c, vdupq_n_u8(128)); }
    static Ints widened(uint8x16_t bytes) {
        const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_high_u8(bytes);
        return {vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))), vreinterpretq_s32_u32(vmovl_high_u16(low)),
                vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))), vreinterpretq_s32_u32(vmovl_high_u16(high))};
    }
    // four floats; first: the byte at which each begins, four times over
    static float32x4_t looked_up(const Table& table, uint8x16_t first) {
        const uint8x16_t byte = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
        return vreinterpretq_f32_u8(vqtbl4q_u8(table, vorrq_u8(first, byte)));
    }
    // the row's bytes of four registers of a tile
    static uint8x16_t pieces(const uint8_t* at, int a, int b, int c, int d) {
        uint32_t four[4];
        const int index[4] = {a, b, c, d};
        for (int i = 0; i < 4; ++i)
            std::memcpy(four + i, at + codes_plane_bytes * index[i], sizeof four[i]);
        return vreinterpretq_u8_u32(vld1q_u32(four));
    }
    static int8x16_t shifts(int a, int b, int c, int d) {
        const auto of = [](int by) { return static_cast<int8_t>(by); };
        return int8x16_t{of(a), of(a), of(a), of(a), of(b), of(b), of(b), of(b),
                         of(c), of(c), of(c), of(c), of(d), of(d), of(d), of(d)};
    }
    static uint8x16_t part(uint8x16_t plane, int8x16_t by, uint8_t mask) {
        return vandq_u8(vshlq_u8(plane, by), vdupq_n_u8(mask));
    }
};

} // namespace

CodesFunctions codes_neon(const CodesView& w, InputForm form) {
    return choose_functions<Neon>(w, form);
}

} // namespace bitpalette
#endif
