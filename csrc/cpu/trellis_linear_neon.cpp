// The trellis kernel for NEON with dot product: two registers are the eight pairs of columns of a tile's row.
//
// There is no multiplication that gives the high half of 16-bit products, but one of 32-bit lanes as fast as one of
// 16-bit lanes: the windows of even and of odd columns get registers of their own and are multiplied by 0x83DCD12D at
// once, 4 multiplications for 16 windows where halves take 8. Lane j has the product of column 2 j or of column 2 j +
// 1, so its four bytes meet an int8 input four times over:
//
//     twice   bytes   x0 x0 x1 x1 | x2 x2 x3 x3 | ...      as 16-bit lanes, trn1: x0 x0 x0 x0 | x2 x2 x2 x2 | ...
//                                                                          trn2: x1 x1 x1 x1 | x3 x3 x3 x3 | ...
//
// The dot product takes signed bytes on both sides, so products are taken less 128 a byte, x * (sum of bytes - 512),
// and sums start from 2 x in place of -510 x.
#include "trellis_linear_body.h"

#if BITPALETTE_AARCH64
#include <arm_neon.h>

namespace bitpalette {
namespace {

// What belongs to a tile's row: lane j of a and b is about columns 2 j and 2 j + 1.
struct Pairs {
    uint32x4_t a, b; // pairs 0..3, 4..7
};
// Products of 32 bits, or their byte sums, 16 bits a lane: evens and odds in a register each.
struct Columns {
    Pairs even, odd;
};
struct Levels {
    int16x8_t even, odd;
};

inline Pairs load_window_pairs(const void* from) {
    const auto* words = static_cast<const uint32_t*>(from);
    return {vld1q_u32(words), vld1q_u32(words + 4)};
}

// The windows of a row, 32 bits a lane.
struct RowDecoder {
    uint8x16_t pick_a, pick_b;
    int32x4_t right_a, right_b; // shifts left, so all are negative
    int32x4_t next_a, next_b;   // for the odd columns

    // left brings the odd column's window to bit 16: 16 less brings it to bit 0
    RowDecoder(Pairs pick, Pairs right, Pairs left)
        : pick_a(vreinterpretq_u8_u32(pick.a)), pick_b(vreinterpretq_u8_u32(pick.b)),
          right_a(vnegq_s32(vreinterpretq_s32_u32(right.a))), right_b(vnegq_s32(vreinterpretq_s32_u32(right.b))),
          next_a(vsubq_s32(vreinterpretq_s32_u32(left.a), vdupq_n_s32(16))),
          next_b(vsubq_s32(vreinterpretq_s32_u32(left.b), vdupq_n_s32(16))) {}

    Columns operator()(const uint8_t* piece, uint32x4_t mask, uint32x4_t factor) const {
        const uint8x16_t bytes = vld1q_u8(piece);
        const uint32x4_t a = vreinterpretq_u32_u8(vqtbl1q_u8(bytes, pick_a)); // a pick of 0x80 gives 0
        const uint32x4_t b = vreinterpretq_u32_u8(vqtbl1q_u8(bytes, pick_b));
        const auto product = [&](uint32x4_t four, int32x4_t by) {
            return vmulq_u32(vandq_u32(vshlq_u32(four, by), mask), factor);
        };
        return {{product(a, right_a), product(b, right_b)}, {product(a, next_a), product(b, next_b)}};
    }
};

// Sums of the four bytes of each product.
inline Levels levels_of(const Columns& p) {
    const auto sums = [](Pairs x) {
        const uint16x8_t a = vpaddlq_u8(vreinterpretq_u8_u32(x.a)), b = vpaddlq_u8(vreinterpretq_u8_u32(x.b));
        return vreinterpretq_s16_u16(vpaddq_u16(a, b));
    };
    return {sums(p.even), sums(p.odd)};
}

// Of the input of a tile's row: 16 of int16, or each int8 twice.
struct InputRow {
    int16x8_t a, b;
};

struct Sums {
    int32x4_t a, b; // by pairs
};

inline Sums add_level_products(Sums s, const Levels& level, const InputRow& x) {
    const int16x8_t even = vuzp1q_s16(x.a, x.b), odd = vuzp2q_s16(x.a, x.b);
    s.a = vmlal_s16(s.a, vget_low_s16(level.even), vget_low_s16(even));
    s.b = vmlal_high_s16(s.b, level.even, even);
    s.a = vmlal_s16(s.a, vget_low_s16(level.odd), vget_low_s16(odd));
    s.b = vmlal_high_s16(s.b, level.odd, odd);
    return s;
}

inline int8x16_t centred(uint32x4_t product) {
    return vreinterpretq_s8_u8(veorq_u8(vreinterpretq_u8_u32(product), vdupq_n_u8(128)));
}

inline InputRow load_input_row(const void* from) {
    const auto* shorts = static_cast<const int16_t*>(from);
    return {vld1q_s16(shorts), vld1q_s16(shorts + 8)};
}

inline Sums load_offsets(const int32_t* from) {
    return {vld1q_s32(from), vld1q_s32(from + 4)};
}

inline float32x4_t summed(float32x4_t a, float32x4_t b) {
    const float32x4_t four = vaddq_f32(a, b);
    return vpaddq_f32(four, four);
}

// From three vectors on, and for inputs of 16 bits: a row at a time, since the sums of eight vectors take 16 registers.
struct Neon {
    struct Floats {
        float32x4_t a, b;
    };
    using Ints = Sums;
    static constexpr int lanes = 8, rows = 1;

    static Floats all(float value) { return {vdupq_n_f32(value), vdupq_n_f32(value)}; }
    static Floats load(const float* from) { return {vld1q_f32(from), vld1q_f32(from + 4)}; }
    static void store(float* to, Floats f) {
        vst1q_f32(to, f.a);
        vst1q_f32(to + 4, f.b);
    }
    static Floats multiply_add(Floats x, Floats y, Floats z) {
        return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b)};
    }
    static Floats to_floats(Ints i) { return {vcvtq_f32_s32(i.a), vcvtq_f32_s32(i.b)}; }
    static void row_totals(Floats f, float* to) { *to = vpadds_f32(vget_low_f32(summed(f.a, f.b))); }
    static Pairs load_aligned(const void* from) { return load_window_pairs(from); }
    static InputRow load_row(const void* from) { return load_input_row(from); }
    static Ints load_pairs(const int32_t* from) { return load_offsets(from); }
    static Ints add_products(Ints sum, const Levels& level, const InputRow& x) {
        return add_level_products(sum, level, x);
    }
    static void store_weights(const Levels& level, float scale, float* to) {
        const auto weights = [&](int16x8_t part, float* at) {
            const int16x8_t centred = vsubq_s16(part, vdupq_n_s16(510));
            vst1q_f32(at, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(centred))), scale));
            vst1q_f32(at + 4, vmulq_n_f32(vcvtq_f32_s32(vmovl_high_s16(centred)), scale));
        };
        weights(vzip1q_s16(level.even, level.odd), to);
        weights(vzip2q_s16(level.even, level.odd), to + 8);
    }
};

// One or two vectors of int8: two rows at a time share what is done to the input.
struct NeonBytes {
    struct Floats {
        Neon::Floats first, second;
    };
    struct Ints {
        int32x4_t a, b, c, d; // a and b of the first row
    };
    struct WindowPairs {
        Pairs first, second;
    };
    // Products; c and d of the second row. Not in pairs: GCC 12 would pass those through memory.
    struct Even {
        uint32x4_t a, b, c, d;
    };
    struct Odd {
        uint32x4_t a, b, c, d;
    };
    static constexpr int lanes = 16, rows = 2;

    static Floats all(float value) { return {Neon::all(value), Neon::all(value)}; }
    static Floats load(const float* from) { return {Neon::load(from), Neon::load(from + 8)}; }
    static void store(float* to, Floats f) {
        Neon::store(to, f.first);
        Neon::store(to + 8, f.second);
    }
    static Floats multiply_add(Floats x, Floats y, Floats z) {
        return {Neon::multiply_add(x.first, y.first, z.first), Neon::multiply_add(x.second, y.second, z.second)};
    }
    static Floats to_floats(Ints i) { return {Neon::to_floats({i.a, i.b}), Neon::to_floats({i.c, i.d})}; }
    static void row_totals(Floats f, float* to) {
        Neon::row_totals(f.first, to);
        Neon::row_totals(f.second, to + 1);
    }
    static Ints zero() {
        const int32x4_t none = vdupq_n_s32(0);
        return {none, none, none, none};
    }
    static Ints add(Ints x, Ints y) {
        return {vaddq_s32(x.a, y.a), vaddq_s32(x.b, y.b), vaddq_s32(x.c, y.c), vaddq_s32(x.d, y.d)};
    }
    static WindowPairs load_aligned(const void* from) {
        return {load_window_pairs(from), load_window_pairs(static_cast<const uint32_t*>(from) + trellis_pairs)};
    }
    static InputRow load_row(const void* from) { return load_input_row(from); }
    // -510 x to 2 x: -510 * 0x01010101 = -2 * 0xFFFFFFFF = 2 mod 2^32
    static Ints load_pairs(const int32_t* from) {
        const Sums offset = load_offsets(from);
        const int32x4_t a = vmulq_n_s32(offset.a, 0x01010101), b = vmulq_n_s32(offset.b, 0x01010101);
        return {a, b, a, b};
    }
    static Ints add_byte_products(Ints s, const Even& p, const InputRow& x) {
        return add_dots(s, p, vtrn1q_s16(x.a, x.a), vtrn1q_s16(x.b, x.b));
    }
    static Ints add_byte_products(Ints s, const Odd& p, const InputRow& x) {
        return add_dots(s, p, vtrn2q_s16(x.a, x.a), vtrn2q_s16(x.b, x.b));
    }

  private:
    template <class Products>
    static Ints add_dots(Ints s, const Products& p, int16x8_t a, int16x8_t b) {
        const int8x16_t x = vreinterpretq_s8_s16(a), y = vreinterpretq_s8_s16(b);
        return {vdotq_s32(s.a, centred(p.a), x), vdotq_s32(s.b, centred(p.b), y), vdotq_s32(s.c, centred(p.c), x),
                vdotq_s32(s.d, centred(p.d), y)};
    }
};

template <>
struct Products<Neon> {
    Columns columns;
};

template <>
struct Products<NeonBytes> {
    NeonBytes::Even low;
    NeonBytes::Odd high;
};

inline uint32x4_t window_mask(int window) {
    return vdupq_n_u32((1u << window) - 1);
}

// Windows are masked in any case, since others follow them in their lanes.
template <>
struct Decoder<Neon, true> {
    RowDecoder row;
    uint32x4_t mask, factor;

    Decoder(Pairs pick, Pairs right, Pairs left, int window)
        : row(pick, right, left), mask(window_mask(window)), factor(vdupq_n_u32(0x83DCD12D)) {}
    // of one row's windows: how `decode` loads them
    Decoder(InputRow pick, InputRow right, InputRow left, int window)
        : Decoder(pairs(pick), pairs(right), pairs(left), window) {}

    Products<Neon> operator()(const uint8_t* const* pieces) const { return {row(pieces[0], mask, factor)}; }

  private:
    static Pairs pairs(InputRow x) { return {vreinterpretq_u32_s16(x.a), vreinterpretq_u32_s16(x.b)}; }
};

template <>
struct Decoder<NeonBytes, true> {
    RowDecoder first, second;
    uint32x4_t mask, factor;

    Decoder(NeonBytes::WindowPairs pick, NeonBytes::WindowPairs right, NeonBytes::WindowPairs left, int window)
        : first(pick.first, right.first, left.first), second(pick.second, right.second, left.second),
          mask(window_mask(window)), factor(vdupq_n_u32(0x83DCD12D)) {}

    Products<NeonBytes> operator()(const uint8_t* const* pieces) const {
        const Columns x = first(pieces[0], mask, factor), y = second(pieces[1], mask, factor);
        return {{x.even.a, x.even.b, y.even.a, y.even.b}, {x.odd.a, x.odd.b, y.odd.a, y.odd.b}};
    }
};

template <class V>
Levels levels(const Products<Neon>& p) {
    return levels_of(p.columns);
}

void multiply_neon(const TrellisWeight& w, const TrellisVectors& x, int64_t tile_row, float* sums) {
    constexpr TrellisMultiply by_bytes[] = {multiply_tiles<NeonBytes, 1, true, true>,
                                            multiply_tiles<NeonBytes, 2, true, true>};
    constexpr TrellisMultiply by_levels[trellis_most_vectors] = {
        multiply_tiles<Neon, 1, true, false>, multiply_tiles<Neon, 2, true, false>,
        multiply_tiles<Neon, 3, true, false>, multiply_tiles<Neon, 4, true, false>,
        multiply_tiles<Neon, 5, true, false>, multiply_tiles<Neon, 6, true, false>,
        multiply_tiles<Neon, 7, true, false>, multiply_tiles<Neon, 8, true, false>};
    (x.twice != nullptr && x.n <= 2 ? by_bytes : by_levels)[x.n - 1](w, x, tile_row, sums);
}

} // namespace

const TrellisLinearUnit trellis_linear_neon{multiply_neon, decode<Neon>, nullptr};

} // namespace bitpalette
#endif
