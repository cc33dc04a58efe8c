// Formats of the GEMM with int8 activations: m16n8k32, sums in int32.
//
// Activations are int8 with one scale a token, every four columns in the order 0, 2, 1, 3 (transform_input.cuh), which
// is the order of the columns in the bytes that a mask takes out of a word of nibbles.
#pragma once

#include "act16.cuh"
#include "gemm_body.cuh"

namespace bitpalette {

// What all of them share. A is the type of y.
template <class A>
struct Int8Activations {
    using Act = A;
    struct Table {};
    using Sum = int32_t;
    static constexpr int column_bytes = 1;
    static constexpr int multiplies = 2;
    static constexpr int table_bytes = 0;

    BP_DEVICE static void fill(const FragmentArgs&, uint8_t*, int) {}
    BP_DEVICE static Table table(const FragmentArgs&, const uint8_t*) { return {}; }
    BP_DEVICE static void load_tokens(const uint8_t* tokens, int k, uint32_t (&b)[2]) {
        const uint32_t* pieces = reinterpret_cast<const uint32_t*>(tokens + k * 2 * tile_side);
        b[0] = pieces[0];
        b[1] = pieces[tile_side / 4];
    }
    BP_DEVICE static void mma(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { ptx::mma_s8(c, a, b); }
    BP_DEVICE static float value(int32_t sum) { return ptx::int_to_float(sum); }
};

// Bytes of the low and of the high nibbles: columns 0, 2, 1, 3 of rows g and g + 8.
BP_DEVICE uint32_t low_nibbles(uint32_t word) {
    return word & 0x0f0f0f0fu;
}
BP_DEVICE uint32_t high_nibbles(uint32_t word) {
    return word >> 4 & 0x0f0f0f0fu;
}

constexpr uint32_t sign_bits = 0x80808080u;

template <int Bits>
struct ByteCodes;

template <>
struct ByteCodes<4> {
    using Words = NibbleWords<4>;
    // codes 0 to 15 as they are: of tiles 2k and 2k + 1, rows g, g + 8
    BP_DEVICE static void codes(const Words& words, int k, uint32_t (&a)[4]) {
        a[0] = low_nibbles(words.word[2 * k]);
        a[1] = high_nibbles(words.word[2 * k]);
        a[2] = low_nibbles(words.word[2 * k + 1]);
        a[3] = high_nibbles(words.word[2 * k + 1]);
    }
    static constexpr int centre = 0; // what has been subtracted
};

template <>
struct ByteCodes<8> {
    using Words = ByteWords;
    BP_DEVICE static void codes(const Words& words, int k, uint32_t (&a)[4]) {
        BP_UNROLL
        for (int i = 0; i < 4; ++i)
            a[i] = words.word[4 * k + i] ^ sign_bits;
    }
    static constexpr int centre = 128;
};

// One scale and one zero point a row. The zero point is left to the end: sum (q - z) x = sum q x - z sum x.
template <class A, int Bits>
struct ChannelA8 : Int8Activations<A> {
    using Words = typename ByteCodes<Bits>::Words;
    using Total = int32_t;
    struct Group {};
    struct Row {
        float scale;
        int32_t zero;
    };
    using Table = typename Int8Activations<A>::Table;
    static constexpr bool scaled = false;
    static constexpr int first_bytes = 0;
    static constexpr int least_bytes = Bits * block_side * block_side / 8, most_bytes = least_bytes;

    BP_HOST_DEVICE static int superblock_bytes(const FragmentArgs&) { return most_bytes; }
    BP_DEVICE static Words load(const Table&, const uint8_t* superblock, int n16, int lane) {
        return Words::load(superblock, n16, lane);
    }
    BP_DEVICE static Group group(const FragmentArgs&, const uint8_t*, bool, const uint8_t*) { return {}; }
    BP_DEVICE static void fragment(const Table&, const Group&, const Words& words, int k, uint32_t (&a)[4]) {
        ByteCodes<Bits>::codes(words, k, a);
    }
    BP_DEVICE static Row row(const GemmArgs& args, int row) {
        const int32_t zero = static_cast<int32_t>(args.row_zero ? args.row_zero[row] : args.fragment.default_zero);
        return {ptx::f16_to_float(args.scale[row]), zero - ByteCodes<Bits>::centre};
    }
    BP_DEVICE static float result(const GemmArgs& args, const Row& row, int token, int32_t total) {
        const int32_t exact = total - row.zero * args.token_sum[token];
        return ptx::int_to_float(exact) * row.scale * args.token_scale[token];
    }
};

// (code * scale + offset) for four codes in one multiply-add: no byte carries into the next, since code * scale +
// offset is at most 255 (kernels/tiles.py checks it). The byte's top bit flipped makes it code * scale + offset - 128.
BP_DEVICE uint32_t scale_bytes(uint32_t codes, uint32_t scale, uint32_t offset) {
    return (codes * scale + offset) ^ sign_bits;
}
BP_DEVICE uint32_t splat8(uint32_t byte) {
    return byte * 0x01010101u;
}

// Groups with fp16 scales, int 4: a group's sum is exact, the groups' sums are added in fp32.
template <class A>
struct GroupedA8 : Int8Activations<A> {
    using Words = NibbleWords<4>;
    using Total = float;
    struct Group {
        uint32_t offset, offset8; // 128 - zero, in every byte
        float scale, scale8;
    };
    struct Row {};
    using Table = typename Int8Activations<A>::Table;
    static constexpr bool scaled = true;
    static constexpr int first_bytes = 2;
    static constexpr int least_bytes = block_side * block_side / 2, most_bytes = least_bytes;

    BP_HOST_DEVICE static int superblock_bytes(const FragmentArgs&) { return most_bytes; }
    BP_DEVICE static Words load(const Table&, const uint8_t* superblock, int n16, int lane) {
        return Words::load(superblock, n16, lane);
    }
    BP_DEVICE static Group group(const FragmentArgs& args, const uint8_t* scales, bool has_zeros,
                                 const uint8_t* zeros) {
        const uint16_t* scale = reinterpret_cast<const uint16_t*>(scales);
        const uint32_t zero = has_zeros ? zeros[0] : args.default_zero,
                       zero8 = has_zeros ? zeros[8] : args.default_zero;
        return {splat8(128 - zero), splat8(128 - zero8), ptx::f16_to_float(scale[0]), ptx::f16_to_float(scale[8])};
    }
    BP_DEVICE static void fragment(const Table&, const Group& group, const Words& words, int k, uint32_t (&a)[4]) {
        ByteCodes<4>::codes(words, k, a);
        BP_UNROLL
        for (int i = 0; i < 4; ++i)
            a[i] = (a[i] + (i % 2 ? group.offset8 : group.offset)) ^ sign_bits;
    }
    BP_DEVICE static Row row(const GemmArgs&, int) { return {}; }
    BP_DEVICE static float result(const GemmArgs& args, const Row&, int token, float total) {
        return total * args.token_scale[token];
    }
};

// Groups with scales of a few bits under one fp16 a row ("progressive", as QServe has them, arXiv 2405.04532): the
// weight is an int8 again, all sums are exact. By a multiply-add and an exclusive or, as LiquidGEMM (arXiv 2509.01229).
template <class A>
struct ProgressiveA8 : Int8Activations<A> {
    using Words = NibbleWords<4>;
    using Total = int32_t;
    struct Group {
        uint32_t scale, scale8;
        uint32_t offset, offset8; // 128 - zero * scale, in every byte
    };
    struct Row {
        float scale;
    };
    using Table = typename Int8Activations<A>::Table;
    static constexpr bool scaled = false;
    static constexpr int first_bytes = 1;
    static constexpr int least_bytes = block_side * block_side / 2, most_bytes = least_bytes;

    BP_HOST_DEVICE static int superblock_bytes(const FragmentArgs&) { return most_bytes; }
    BP_DEVICE static Words load(const Table&, const uint8_t* superblock, int n16, int lane) {
        return Words::load(superblock, n16, lane);
    }
    BP_DEVICE static Group group(const FragmentArgs&, const uint8_t* scales, bool, const uint8_t* offsets) {
        return {scales[0], scales[8], splat8(offsets[0]), splat8(offsets[8])};
    }
    BP_DEVICE static void fragment(const Table&, const Group& group, const Words& words, int k, uint32_t (&a)[4]) {
        ByteCodes<4>::codes(words, k, a);
        BP_UNROLL
        for (int i = 0; i < 4; ++i)
            a[i] = scale_bytes(a[i], i % 2 ? group.scale8 : group.scale, i % 2 ? group.offset8 : group.offset);
    }
    BP_DEVICE static Row row(const GemmArgs& args, int row) { return {ptx::f16_to_float(args.scale[row])}; }
    BP_DEVICE static float result(const GemmArgs& args, const Row& row, int token, int32_t total) {
        return ptx::int_to_float(total) * row.scale * args.token_scale[token];
    }
};

} // namespace bitpalette
