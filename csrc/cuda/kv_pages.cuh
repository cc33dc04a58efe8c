// Steps over 32 tokens of a page, half of it: packed keys and values in shared memory become fragments of fp16.
//
// Keys are operand A of the scores. Lane 4 g + t reads words of the rows of tokens g, g + 8, g + 16, g + 24; which
// elements they hold does not matter as long as the queries' fragments have the same (kv_query_element). Values,
// transposed, are operand A of the outputs, where neighbours in a register are neighbouring tokens: the lane reads
// bytes of tokens 2t, 2t + 1, 2t + 8, 2t + 9, and halves of words of two tokens make one word of pairs.
//
// Rows are copied in pieces of 16 bytes, and the places of pieces are permuted (xor within 128 bytes) so that a warp's
// reads meet each bank once: rows of keys of 128 or 256 bytes, rows of values of 32, 64, 128 or 256. Reading takes rows
// of Width elements; narrower ones are brought into that form first, which costs about as much as the products.
#pragma once

#include "kv_levels.cuh"
#include "kv_softmax.cuh"

namespace bitpalette {

// The permutation: to the number of a piece, by xor, given the row that the piece is of.
BP_DEVICE int kv_key_swizzle(int row, int row_bytes) {
    return row_bytes % 128 == 0 ? row % 2 * 4 : 0;
}
BP_DEVICE bool kv_value_permuted(int row_bytes) {
    return row_bytes >= 32 && (row_bytes & (row_bytes - 1)) == 0;
}
BP_DEVICE int kv_value_swizzle(int row, int row_bytes) {
    if (!kv_value_permuted(row_bytes))
        return 0;
    return (row_bytes == 32 ? row / 4 : row / 2) % 4 * 2; // neighbours 2t, 2t + 2 apart
}

// A row's codes of Width elements, and what of them a lane reads.
template <int Bits, int Width>
struct KvRow {
    using Levels = KvLevels<Bits>;
    static constexpr int plane = Levels::plane, fields = Levels::fields;
    // Keys: words of lane t, in chunks of neighbours
    static constexpr int words = Width * plane / 128;
    static constexpr int vector = words < 4 ? words : 4;
    // Values: bytes of lane g, in chunks of 16 at most
    static constexpr int bytes = Width * plane / 64;
    static constexpr int chunk = bytes < 16 ? bytes : 16;
    static constexpr int chunk_words = chunk < 4 ? 1 : chunk / 4;

    // Of lane t, k-step `step` of 16 elements, pair 0 or 1 and its member 0 or 1.
    BP_DEVICE static int query_element(int t, int step, int pair, int member) {
        const int word = step / (fields / 2), field = 2 * (step % (fields / 2)) + pair;
        const int index = word / vector * 4 * vector + t * vector + word % vector;
        return index * 2 * fields + field + member * fields;
    }
    BP_DEVICE static int element(int g, int slot) {
        constexpr int of_chunk = chunk * 8 / plane;
        return slot / of_chunk * 8 * of_chunk + g * of_chunk + slot % of_chunk;
    }
};

// Neighbouring bytes into words.
template <int Bytes>
BP_DEVICE void kv_read(const uint8_t* from, uint32_t (&to)[Bytes < 4 ? 1 : Bytes / 4]) {
    if constexpr (Bytes == 1) {
        to[0] = ptx::lds(from);
    } else if constexpr (Bytes == 2) {
        to[0] = ptx::lds(reinterpret_cast<const uint16_t*>(from));
    } else if constexpr (Bytes == 4) {
        to[0] = ptx::lds(reinterpret_cast<const uint32_t*>(from));
    } else if constexpr (Bytes == 8) {
        const uint2 two = ptx::lds(reinterpret_cast<const uint2*>(from));
        to[0] = two.x;
        to[1] = two.y;
    } else {
        static_assert(Bytes == 16);
        const uint4 four = ptx::lds(reinterpret_cast<const uint4*>(from));
        to[0] = four.x;
        to[1] = four.y;
        to[2] = four.z;
        to[3] = four.w;
    }
}

// 32 rows of codes as they are in memory, to where the readers below want those of Width elements. Rows are whole words
// but for 3 bits of an odd number of 16 elements. What lies behind a row's codes stays what it was: such keys meet
// queries of zero, and such outputs are not written.
template <int Bits, int Width, class Swizzle>
BP_DEVICE void kv_widen(const uint8_t* from, int width, uint8_t* to, Swizzle swizzle) {
    using Row = KvRow<Bits, Width>;
    constexpr int row_bytes = Width * Bits / 8;
    const int row = static_cast<int>(ptx::lane()), low = width * Row::plane / 8, all = width * Bits / 8;
    const int permuted = swizzle(row, row_bytes) * 16;
    from += row * all;
    BP_ROLLED
    for (int i = 0; i < all; i += 2) {
        const int at = i < low ? i : i - low + Width / 4;
        const uint16_t two = ptx::lds(reinterpret_cast<const uint16_t*>(from + i));
        ptx::sts(reinterpret_cast<uint16_t*>(to + ((row * row_bytes + at) ^ permuted)), two);
    }
}

// score += keys [32 tokens] times queries: fragments [k-step][tile].
template <int Bits, int Width, int Tiles>
BP_DEVICE void kv_scores(const uint8_t* rows, const uint32_t (&query)[Width / 16][Tiles][2],
                         float (&score)[2][Tiles][4]) {
    using Row = KvRow<Bits, Width>;
    constexpr int fields = Row::fields, vector = Row::vector, row_bytes = Width * Bits / 8;
    const int lane = static_cast<int>(ptx::lane()), g = lane / 4, t = lane % 4;
    BP_UNROLL
    for (int first = 0; first < Row::words; first += vector) {
        uint32_t word[4][vector], high[4][vector == 4 ? 2 : 1] = {};
        const int of_lane = (g * row_bytes + 16 * first + 4 * vector * t) ^ kv_key_swizzle(g, row_bytes) * 16;
        BP_UNROLL
        for (int i = 0; i < 4; ++i) {
            kv_read<4 * vector>(rows + of_lane + 8 * i * row_bytes, word[i]);
            if constexpr (Bits == 3)
                kv_read<2 * vector>(rows + (g + 8 * i) * row_bytes + Width / 4 + 2 * vector * t, high[i]);
        }
        BP_UNROLL
        for (int w = 0; w < vector; ++w) {
            uint32_t level[4][fields];
            BP_UNROLL
            for (int i = 0; i < 4; ++i) {
                uint32_t third = 0;
                if constexpr (Bits == 3)
                    third = ptx::prmt(high[i][w / 2], 0, w % 2 == 0 ? 0x4140 : 0x4342);
                Row::Levels::decode(word[i][w], third, level[i]);
            }
            BP_UNROLL
            for (int f = 0; f < fields; f += 2)
                BP_UNROLL
            for (int half = 0; half < 2; ++half) {
                const uint32_t (&low)[fields] = level[2 * half];
                const uint32_t (&up)[fields] = level[2 * half + 1];
                const uint32_t a[4] = {low[f], up[f], low[f + 1], up[f + 1]};
                BP_UNROLL
                for (int tile = 0; tile < Tiles; ++tile)
                    ptx::mma_f16(score[half][tile], a, query[(first + w) * (fields / 2) + f / 2][tile]);
            }
        }
    }
}

// out += values [32 tokens], transposed, times weights.
template <int Bits, int Width, int Tiles>
BP_DEVICE void kv_outputs(const uint8_t* rows, const uint32_t (&weight)[2][Tiles][2],
                          float (&out)[Width / 16][Tiles][4]) {
    using Row = KvRow<Bits, Width>;
    constexpr int fields = Row::fields, chunk = Row::chunk, words = Row::chunk_words;
    constexpr int halves = chunk < 4 ? 1 : 2; // of a word
    constexpr int high_bytes = chunk / 2;     // of 3 bits
    constexpr int row_bytes = Width * Bits / 8;
    const int lane = static_cast<int>(ptx::lane()), g = lane / 4, t = lane % 4;
    BP_UNROLL
    for (int half = 0; half < 2; ++half)
        BP_UNROLL
    for (int first = 0; first < Row::bytes; first += chunk) {
        uint32_t word[4][words], high[4][high_bytes < 4 ? 1 : high_bytes / 4] = {};
        BP_UNROLL
        for (int i = 0; i < 4; ++i) { // tokens 2t, 2t + 1, 2t + 8, 2t + 9 of a half
            const int row = 2 * t + i / 2 * 8 + i % 2, swizzle = kv_value_swizzle(row, row_bytes);
            const uint8_t* from = rows + 16 * half * row_bytes;
            kv_read<chunk>(from + 8 * first + ((row * row_bytes + chunk * g) ^ swizzle * 16), word[i]);
            if constexpr (Bits == 3)
                kv_read<high_bytes>(from + row * row_bytes + Width / 4 + high_bytes * g, high[i]);
        }
        BP_UNROLL
        for (int unit = 0; unit < words * halves; ++unit) {
            const int w = unit / halves;
            uint32_t level[2][fields]; // of tokens 2t, 2t + 1, then of 2t + 8, 2t + 9
            BP_UNROLL
            for (int i = 0; i < 2; ++i) {
                const uint32_t pair =
                    ptx::prmt(word[2 * i][w], word[2 * i + 1][w], unit % halves == 0 ? 0x5410 : 0x7632);
                uint32_t third = 0;
                if constexpr (Bits == 3)
                    third = ptx::prmt(high[2 * i][unit / 4], high[2 * i + 1][unit / 4],
                                      0x0400u + 0x0101u * static_cast<unsigned>(unit % 4));
                Row::Levels::decode(pair, third, level[i]);
            }
            BP_UNROLL
            for (int f = 0; f < fields; f += 2) {
                const uint32_t a[4] = {level[0][f], level[0][f + 1], level[1][f], level[1][f + 1]};
                const int slot = (first / chunk * words * halves + unit) * fields + f;
                BP_UNROLL
                for (int tile = 0; tile < Tiles; ++tile)
                    ptx::mma_f16(out[slot / 2][tile], a, weight[half][tile]);
            }
        }
    }
}

} // namespace bitpalette
