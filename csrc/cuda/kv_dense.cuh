// Steps over tokens that are in 16 or 32 bits: sinks, window, fresh ones. Fragments come straight from global memory;
// there are few of them, and they are split among as many warps as there are steps.
//
// All factors go in two parts of bf16, rounded and the rest: 16 bits of what fp32 has, all of fp16 and bf16. So one
// body serves all types.
#pragma once

#include "elements.cuh"
#include "kv_softmax.cuh"

namespace bitpalette {

// Of token i of sinks, window, fresh, one after another; null beyond the last.
struct KvDenseRow {
    const char *key = nullptr, *value = nullptr;

    BP_DEVICE KvDenseRow(const KvAttentionArgs& args, const KvSpan& span, int row, int head, int i) {
        if (i >= span.dense_tokens())
            return;
        const int part = i < span.dense[0] ? 0 : i < span.dense[0] + span.dense[1] ? 1 : 2;
        const KvDense& d = args.dense[part];
        i -= part == 0 ? 0 : part == 1 ? span.dense[0] : span.dense[0] + span.dense[1];
        int slot = (d.first == nullptr ? 0 : d.first[row]) + i;
        slot -= slot >= d.slots ? d.slots : 0;
        const int bytes = args.dense_dtype == Dtype::f32 ? 4 : 2;
        key = static_cast<const char*>(d.keys) + (row * d.key_batch + slot * d.key_token + head * d.key_head) * bytes;
        value = static_cast<const char*>(d.values) +
                (row * d.value_batch + slot * d.value_token + head * d.value_head) * bytes;
    }
};

// Pairs of fp32 as bf16, and what the rounding left.
struct KvParts {
    uint32_t high, low;

    BP_DEVICE KvParts() : high(0), low(0) {}
    BP_DEVICE KvParts(float a, float b) : high(ptx::pack_bf16x2(a, b)) {
        const float2 rounded = ptx::unpack_bf16x2(high);
        low = ptx::pack_bf16x2(a - rounded.x, b - rounded.y);
    }
};

// Elements d..d+3 of a row, d a multiple of 4; zeros beyond its width and where there is no row.
BP_DEVICE void kv_load_four(const char* row, Dtype dtype, int d, int width, KvParts (&to)[2]) {
    if (row == nullptr || d >= width)
        return;
    if (dtype == Dtype::f32) {
        const float4 x = *reinterpret_cast<const float4*>(row + 4 * d);
        to[0] = KvParts(x.x, x.y);
        to[1] = KvParts(x.z, x.w);
        return;
    }
    const uint2 x = *reinterpret_cast<const uint2*>(row + 2 * d);
    if (dtype == Dtype::f16) {
        const float2 a = ptx::unpack_f16x2(x.x), b = ptx::unpack_f16x2(x.y);
        to[0] = KvParts(a.x, a.y);
        to[1] = KvParts(b.x, b.y);
    } else {
        to[0].high = x.x;
        to[1].high = x.y;
    }
}

// c += a b, but for the product of what the roundings left.
BP_DEVICE void kv_multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&a_low)[4], const uint32_t (&b)[2],
                           const uint32_t (&b_low)[2]) {
    ptx::mma_bf16(c, a_low, b);
    ptx::mma_bf16(c, a, b_low);
    ptx::mma_bf16(c, a, b);
}

// The element of slot `slot` of lane 4 g + t.
BP_DEVICE int kv_dense_element(int g, int slot) {
    return slot / 4 * 32 + 4 * g + slot % 4;
}

// 32 tokens from token `base` on. queries: fp32 [8 Tiles, stride] in shared memory.
template <int Width, int Tiles>
BP_DEVICE void kv_dense_step(const KvAttentionArgs& args, const KvSpan& span, int row, int head, int base,
                             const float* queries, int stride, KvSums<Width, Tiles>& sums) {
    const int lane = static_cast<int>(ptx::lane()), g = lane / 4, t = lane % 4;
    const auto token = [&](int i) { return KvDenseRow(args, span, row, head, base + i); };
    float score[2][Tiles][4] = {};
    {
        const KvDenseRow rows[4] = {token(g), token(g + 8), token(g + 16), token(g + 24)};
        for (int d = 0; d < args.head_dim; d += 16) {
            KvParts key[4][2];
            BP_UNROLL
            for (int i = 0; i < 4; ++i)
                kv_load_four(rows[i].key, args.dense_dtype, d + 4 * t, args.head_dim, key[i]);
            BP_UNROLL
            for (int tile = 0; tile < Tiles; ++tile) {
                const float4 q = *reinterpret_cast<const float4*>(queries + (8 * tile + g) * stride + d + 4 * t);
                const KvParts first(q.x, q.y), second(q.z, q.w);
                const uint32_t b[2] = {first.high, second.high}, b_low[2] = {first.low, second.low};
                BP_UNROLL
                for (int half = 0; half < 2; ++half) {
                    const KvParts(&low)[2] = key[2 * half];
                    const KvParts(&up)[2] = key[2 * half + 1];
                    const uint32_t a[4] = {low[0].high, up[0].high, low[1].high, up[1].high};
                    const uint32_t a_low[4] = {low[0].low, up[0].low, low[1].low, up[1].low};
                    kv_multiply(score[half][tile], a, a_low, b, b_low);
                }
            }
        }
    }
    // factors of queries are for halves of levels
    const float key_gain[4] = {.5f, .5f, .5f, .5f}, value_gain[4] = {1, 1, 1, 1};
    int position[4];
    BP_UNROLL
    for (int i = 0; i < 4; ++i) {
        const int at = base + g + 8 * i;
        position[i] = at < span.dense_tokens() ? span.dense_position(at) : INT32_MAX;
    }
    sums.absorb(score, key_gain, value_gain, args.softcap, position, false);
    uint32_t b[2][Tiles][2], b_low[2][Tiles][2];
    float rest[2][Tiles][4], ignored[2][Tiles][4];
    kv_weights<BFloat>(score, b, rest);
    kv_weights<BFloat>(rest, b_low, ignored);
    BP_UNROLL
    for (int half = 0; half < 2; ++half) {
        const int first = 16 * half + 2 * t;
        const KvDenseRow rows[4] = {token(first), token(first + 1), token(first + 8), token(first + 9)};
        BP_UNROLL
        for (int j = 0; j < Width / 32; ++j) {
            if (32 * j >= args.head_dim_v)
                continue;
            KvParts value[4][2];
            BP_UNROLL
            for (int i = 0; i < 4; ++i)
                kv_load_four(rows[i].value, args.dense_dtype, 32 * j + 4 * g, args.head_dim_v, value[i]);
            BP_UNROLL
            for (int word = 0; word < 2; ++word) {
                uint32_t a[4], a_low[4]; // two elements, rows g and g + 8, of tokens 0, 1 and of tokens 2, 3
                BP_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const KvParts &even = value[i / 2 * 2][word], &odd = value[i / 2 * 2 + 1][word];
                    a[i] = ptx::prmt(even.high, odd.high, i % 2 == 0 ? 0x5410 : 0x7632);
                    a_low[i] = ptx::prmt(even.low, odd.low, i % 2 == 0 ? 0x5410 : 0x7632);
                }
                BP_UNROLL
                for (int tile = 0; tile < Tiles; ++tile)
                    kv_multiply(sums.out[2 * j + word][tile], a, a_low, b[half][tile], b_low[half][tile]);
            }
        }
    }
}

} // namespace bitpalette
