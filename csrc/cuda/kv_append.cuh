// New tokens for the packed KV cache: centered, rotated, encoded, packed; or centered and rotated alone, for tokens
// that stay in 16 bits. A warp for a token and head. The format is quant/kv_token.py's; sums, and so the gain, are to
// the bit those of csrc/cpu/kv_append_body.h: eight of them in fp64, element i in sum i mod 8.
#pragma once

#include <cfloat>

#include "elements.cuh"
#include "kv_rotate.cuh"

namespace bitpalette {

constexpr int kv_page_tokens = 64;
constexpr int kv_append_warps = 4;

// Keys or values of one layer, by strides in elements; a vector is contiguous.
struct KvTokens {
    const void* x; // [tokens, heads, width]
    Dtype dtype;
    int64_t token_stride, head_stride;
    int64_t tokens;
    int heads, width;  // width: a multiple of 16, at most kv_most_width
    const float* mean; // [heads, width], subtracted first; or null
    bool rotate;       // false: x is rotated already
    KvRotation rotation;
};

struct KvAppendArgs {
    KvTokens from;
    uint8_t* codes; // [pages, heads, 64, width * bits / 8], aligned to 16
    uint16_t* gain; // [pages, heads, 64], fp16
    int64_t pages;
    int bits;      // 2, 3, 4 or 8
    bool unbiased; // the gain of keys, else of values
    float step;
    const int64_t* slots; // [tokens], page * 64 + token of the page; others than those of `pages`: nothing is written
};

struct KvRotateArgs {
    KvTokens from;
    void* z; // [tokens, heads, width] of dtype, contiguous
    Dtype dtype;
};

// R (x - mean) of one vector to shared memory.
BP_DEVICE void kv_load_row(const KvTokens& x, int64_t token, int head, float* row) {
    const int64_t at = token * x.token_stride + head * x.head_stride;
    for (int i = static_cast<int>(ptx::lane()); i < x.width; i += 32) {
        float value = x.dtype == Dtype::f32   ? load_element<Dtype::f32>(x.x, at + i)
                      : x.dtype == Dtype::f16 ? load_element<Dtype::f16>(x.x, at + i)
                                              : load_element<Dtype::bf16>(x.x, at + i);
        if (x.mean != nullptr)
            value = ptx::add(value, -x.mean[head * x.width + i]);
        row[i] = value;
    }
    ptx::sync_warp();
    if (x.rotate)
        kv_rotate_row(row, x.rotation);
}

// Eight sums, one each in lanes 0 to 7, into their total in all lanes of the warp.
BP_DEVICE double kv_total(double* room, double sum) {
    const int lane = static_cast<int>(ptx::lane());
    if (lane < 8)
        room[lane] = sum;
    BP_MUTATE(kv_append_missing_sync, , ptx::sync_warp());
    const double total = ((room[0] + room[4]) + (room[2] + room[6])) + ((room[1] + room[5]) + (room[3] + room[7]));
    ptx::sync_warp();
    return total;
}

// Codes of elements 8 i..8 i+7 to their place in a packed row; c is aligned to 4.
BP_DEVICE void kv_pack_eight(const uint8_t* c, int bits, int width, int i, uint8_t* row) {
    if (bits == 8) {
        reinterpret_cast<uint32_t*>(row)[2 * i] = *reinterpret_cast<const uint32_t*>(c);
        reinterpret_cast<uint32_t*>(row)[2 * i + 1] = *reinterpret_cast<const uint32_t*>(c + 4);
        return;
    }
    const int plane = bits == 3 ? 2 : bits;
    uint32_t low = 0, high = 0;
    BP_UNROLL
    for (int k = 0; k < 8; ++k) {
        low |= (c[k] & ((1u << plane) - 1)) << plane * k;
        high |= static_cast<uint32_t>(c[k]) >> 2 << k;
    }
    if (bits == 4)
        reinterpret_cast<uint32_t*>(row)[i] = low;
    else
        reinterpret_cast<uint16_t*>(row)[i] = static_cast<uint16_t>(low);
    if (bits == 3)
        row[width / 4 + i] = static_cast<uint8_t>(high);
}

// A block's shared memory: for every warp a row in fp32, eight sums, codes.
BP_HOST_DEVICE constexpr int kv_append_room(int width) {
    return 4 * width + 64 + (width + 15) / 16 * 16;
}

template <bool Encode>
BP_GLOBAL void BP_LAUNCH_BOUNDS(32 * kv_append_warps, 8)
    kv_append_kernel(const KvAppendArgs args, void* z, Dtype dtype) {
    BP_DYNAMIC_SHARED(shared);
    const KvTokens& x = args.from;
    const int lane = static_cast<int>(ptx::lane());
    const int64_t index = static_cast<int64_t>(ptx::block()) * kv_append_warps + ptx::warp();
    if (index >= x.tokens * x.heads)
        return;
    const int64_t token = index / x.heads;
    const int head = static_cast<int>(index % x.heads), width = x.width;
    float* row = reinterpret_cast<float*>(shared + static_cast<int>(ptx::warp()) * kv_append_room(width));
    if constexpr (!Encode) {
        kv_load_row(x, token, head, row);
        for (int i = lane; i < width; i += 32) {
            const int64_t at = index * width + i;
            if (dtype == Dtype::f32)
                store_element<Dtype::f32>(z, at, row[i]);
            else if (dtype == Dtype::f16)
                store_element<Dtype::f16>(z, at, row[i]);
            else
                store_element<Dtype::bf16>(z, at, row[i]);
        }
        return;
    }
    const int64_t slot = args.slots[token];
    if (slot < 0 || slot >= args.pages * kv_page_tokens)
        return;
    kv_load_row(x, token, head, row);
    double* sums = reinterpret_cast<double*>(row + width);
    uint8_t* codes = reinterpret_cast<uint8_t*>(sums + 8);

    // products of fp32 are exact in fp64
    double sum = 0;
    if (lane < 8)
        for (int i = lane; i < width; i += 8)
            sum += static_cast<double>(row[i]) * static_cast<double>(row[i]);
    const double energy = kv_total(sums, sum);
    const float scale = ptx::mul(static_cast<float>(ptx::sqrt_rn(energy / static_cast<double>(width))), args.step);
    const bool usable = scale > 0 && scale <= FLT_MAX;
    const int half = 1 << (args.bits - 1), most = 2 * half - 1;
    for (int i = lane; i < width; i += 32) {
        const float position = ptx::add(ptx::div(row[i], usable ? scale : 1.0f), static_cast<float>(half));
        const float low = position > 0 ? position : 0.0f, top = static_cast<float>(most);
        codes[i] = static_cast<uint8_t>(usable ? static_cast<int>(low < top ? low : top) : half);
    }
    ptx::sync_warp();
    double along = 0;
    int32_t squares = 0;
    if (lane < 8)
        for (int i = lane; i < width; i += 8) {
            const int level = 2 * codes[i] - most;
            along += static_cast<double>(row[i]) * static_cast<double>(level);
            squares += level * level;
        }
    const double shared_part = kv_total(sums, along);
    const int32_t total_squares = ptx::redux_add(squares);

    const int64_t place = (slot / kv_page_tokens * x.heads + head) * kv_page_tokens + slot % kv_page_tokens;
    uint8_t* packed = args.codes + place * (width * args.bits / 8);
    for (int i = lane; i < width / 8; i += 32)
        kv_pack_eight(codes + 8 * i, args.bits, width, i, packed);
    if (lane == 0) {
        const double exact = args.unbiased ? energy / shared_part : shared_part / static_cast<double>(total_squares);
        const float gain = exact < 65504 ? static_cast<float>(exact) : 65504.0f;
        // zeros have gain 0; NaN and infinity have gain NaN, and so has attention over them
        args.gain[place] = usable ? ptx::float_to_f16(gain) : scale == 0 ? 0 : 0x7e00;
    }
}

// 0 or a cudaError_t; nothing is launched for no tokens. std::invalid_argument where the sizes do not fit together.
int kv_append(const KvAppendArgs& args, void* stream);
int kv_rotate(const KvRotateArgs& args, void* stream);

} // namespace bitpalette
