// What a warp has of its queries: online softmax (Milakov and Gimelshein, arXiv 1805.02867) over steps of 32 tokens.
//
// Tokens are the rows of all products and queries the columns, so that eight queries fill a matrix instruction:
//
//     scores^T [32 tokens, 8 queries] = K [32, D] Q^T          output^T [D, 8] += V^T [D, 32] weights^T
//
// and a lane 4 g + t has of queries 2t and 2t + 1 (of each tile of eight) the scores of tokens g, g + 8, g + 16, g + 24
// and the outputs of Width / 8 elements: which ones is for those who multiply to say ("slots", 2 a matrix instruction).
#pragma once

#include <cmath>

#include "act16.cuh"
#include "kv_args.cuh"

namespace bitpalette {

constexpr float kv_log2e = 1.44269504f;
// Below any score: what has seen nothing adds nothing, and no difference of two of them is infinite minus infinite.
constexpr float kv_least = -1e30f;
// Weights may grow to 2^8 before everything is scaled by a new maximum: few steps need that, and fp16 has the room.
constexpr float kv_headroom = 8;

// call(score, i, j) for all that a lane has: of its token g + 8 i and its query j.
template <int Tiles, class Call>
BP_DEVICE void kv_each(float (&score)[2][Tiles][4], Call call) {
    BP_UNROLL
    for (int half = 0; half < 2; ++half)
        BP_UNROLL
    for (int tile = 0; tile < Tiles; ++tile)
        BP_UNROLL
    for (int c = 0; c < 4; ++c)
        call(score[half][tile][c], 2 * half + c / 2, 2 * tile + c % 2);
}

// Tiles: of eight queries.
template <int Width, int Tiles>
struct KvSums {
    static constexpr int queries = 2 * Tiles; // of a lane
    float out[Width / 16][Tiles][4];          // [..][0], [1]: slot 2 i of queries 2t, 2t + 1; [2], [3]: slot 2 i + 1
    float most[queries], weight[queries];     // weight: of the lane's tokens
    float factor[queries];                    // of scores, which are then exponents of 2
    int from[queries], last[queries];         // positions that the query sees

    BP_DEVICE void clear() {
        BP_UNROLL
        for (int i = 0; i < Width / 16; ++i)
            BP_UNROLL
        for (int tile = 0; tile < Tiles; ++tile)
            BP_UNROLL
        for (int c = 0; c < 4; ++c)
            out[i][tile][c] = 0;
        BP_UNROLL
        for (int j = 0; j < queries; ++j) {
            most[j] = kv_least;
            weight[j] = 0;
        }
    }

    // Everything so far times factor[j] for the lane's queries.
    BP_DEVICE void scale(const float (&by)[queries]) {
        BP_UNROLL
        for (int i = 0; i < Width / 16; ++i)
            BP_UNROLL
        for (int tile = 0; tile < Tiles; ++tile)
            BP_UNROLL
        for (int c = 0; c < 4; ++c)
            out[i][tile][c] *= by[2 * tile + c % 2];
    }

    // Scores [half of 16 tokens][tile][of the lane], without key_gain (of tokens g + 8 i) and factor, become weights
    // times value_gain. position: of these tokens; all: every query sees all of them, and position is not read.
    BP_DEVICE void absorb(float (&score)[2][Tiles][4], const float (&key_gain)[4], const float (&value_gain)[4],
                          float softcap, const int (&position)[4], bool all) {
        kv_each<Tiles>(score, [&](float& s, int i, int j) { s *= key_gain[i] * factor[j]; });
        if (softcap > 0) {
            const float twice = 2 * ptx::rcp_approx(softcap);
            kv_each<Tiles>(score, [&](float& s, int, int) {
                // tanh x = 1 - 2 / (e^2x + 1)
                s = softcap * kv_log2e * (1 - 2 * ptx::rcp_approx(ptx::exp2_approx(s * twice) + 1));
            });
        }
        if (!all)
            kv_each<Tiles>(score, [&](float& s, int i, int j) {
                if (position[i] < from[j] || position[i] > last[j])
                    s = -INFINITY;
            });
        float top[queries];
        bool exceeds = false;
        BP_UNROLL
        for (int j = 0; j < queries; ++j) {
            const float (&a)[4] = score[0][j / 2];
            const float (&b)[4] = score[1][j / 2];
            top[j] = ptx::max(ptx::max(a[j % 2], a[2 + j % 2]), ptx::max(b[j % 2], b[2 + j % 2]));
            exceeds |= top[j] > most[j] + kv_headroom;
        }
        if (ptx::ballot(exceeds) != 0)
            raise(top);
        kv_each<Tiles>(score, [&](float& s, int i, int j) {
            const float e = ptx::exp2_approx(s - most[j]);
            weight[j] += e;
            s = e * value_gain[i];
        });
        if (!all) // what is not seen may have a gain of NaN
            kv_each<Tiles>(score, [&](float& s, int i, int j) {
                if (position[i] < from[j] || position[i] > last[j])
                    s = 0;
            });
    }

    // The lane's sums of weights become those of the warp.
    BP_DEVICE void finish() {
        BP_UNROLL
        for (int j = 0; j < queries; ++j)
            BP_UNROLL
        for (int mask = 4; mask < 32; mask *= 2)
            weight[j] += ptx::shfl_xor(weight[j], mask);
    }

  private:
    BP_DEVICE void raise(float (&top)[queries]) {
        float decay[queries];
        BP_UNROLL
        for (int j = 0; j < queries; ++j) {
            BP_UNROLL
            for (int mask = 4; mask < 32; mask *= 2)
                top[j] = ptx::max(top[j], ptx::shfl_xor(top[j], mask));
            const float now = ptx::max(most[j], top[j]);
            decay[j] = ptx::exp2_approx(most[j] - now);
            most[j] = now;
            weight[j] *= decay[j];
        }
        scale(decay);
    }
};

// Weights as operand B of the product with values: [half][tile] of 16 tokens. Half or BFloat. rest: what the rounding
// left of them, which a second product brings back.
template <class Act, int Tiles>
BP_DEVICE void kv_weights(const float (&weight)[2][Tiles][4], uint32_t (&b)[2][Tiles][2], float (&rest)[2][Tiles][4]) {
    BP_UNROLL
    for (int half = 0; half < 2; ++half)
        BP_UNROLL
    for (int tile = 0; tile < Tiles; ++tile)
        BP_UNROLL
    for (int i = 0; i < 2; ++i) {
        const float (&w)[4] = weight[half][tile];
        const uint32_t pair = Act::pack(w[2 * i], w[2 * i + 1]);
        const float2 kept = Act::unpack(pair);
        rest[half][tile][2 * i] = w[2 * i] - kept.x;
        rest[half][tile][2 * i + 1] = w[2 * i + 1] - kept.y;
        b[half][tile][i] = ptx::movmatrix(pair);
    }
}

} // namespace bitpalette
