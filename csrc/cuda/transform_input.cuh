// What a layer does to its input before its weight sees it, and the int8 forms of the result: a block for a token.
//
//     x_j * factors_j        `scale` (quant/scale.py), factors = 1 / input_scale
//     x_j with its sign      `rotate` (quant/rotate.py), bit j of signs
//     R x                    the rest of it: DHT_p (x) H_(2^k), n = p 2^k with p odd (quant/hartley.py)
//     y_j = x_(order_j)      `order` (quant/order.py)
//
// in this order, each only where it is asked for; with none of them it quantizes the activations as they are. All in
// fp32. The row is kept in shared memory, or where it is longer than a block may have (23 thousand columns in 99 KiB,
// 57 thousand in 227) in `workspace`, global memory that stays in the L2, by the very same steps.
//
// H acts on the k bits of a column's number one by one, so in any order: a pass takes four of them, 16 columns to a
// thread in registers, so that k = 12 is three passes of a read and a write a column. (Shuffles would cost a column as
// much for each bit as a pass does for four.) The first pass takes the highest bits and reads x itself, neighbouring
// threads neighbouring columns.
#pragma once

#include <cfloat>

#include "elements.cuh"

namespace bitpalette {

constexpr int transform_most_threads = 512; // with 768 and 80 registers the first pass spills
constexpr int transform_columns = 64;       // output rows are zero-filled up to a multiple of it
constexpr int transform_hartley_row = 16;   // rows of `hartley` are padded with zeros to a multiple of it
constexpr int transform_most_odd = 1024;    // of p, as in csrc/cpu/input_transform.h

enum class TransformOutput : int {
    same,   // the dtype of x
    int8,   // code * scale
    planes, // (code + low / 256) * scale
};

// csrc/cpu/activations.h has the int8 forms too, with a scale for some columns; here it is one a token: scale = largest
// magnitude / 127, codes are rounded to nearest even. A token with NaN or infinity has scale NaN and codes 0.
struct TransformInputArgs {
    const void* x;    // [tokens, x_stride] of dtype
    int64_t x_stride; // elements
    int64_t tokens;
    int n;
    Dtype dtype;

    const float* factors; // [n] or null
    const uint8_t* signs; // [ceil(n / 8)] or null
    bool rotate;
    const float* hartley; // DHT_p, fp32 [p, p rounded up to 16]; null where p = 1 or without rotate
    const int32_t* order; // [n], a permutation, or null

    TransformOutput output;
    void* y;      // same: [tokens, stride] of dtype; else int8 codes, the columns of every four in the order 0, 2, 1, 3
    int8_t* low;  // planes: [tokens, stride], likewise
    float* scale; // int8, planes: [tokens]
    int32_t* sum; // int8, planes: [tokens], of code, or of 256 * code + low
    int64_t stride; // elements, a multiple of 64, n or more; zeros from column n on

    float* workspace;    // [tokens, transform_input_room(n)] where a row does not fit into shared memory
    size_t shared_limit; // bytes that the device lets a block ask for
};

// Floats that a row takes.
BP_HOST_DEVICE constexpr int64_t transform_input_room(int n) {
    return (n + 31) / 32 * 32;
}

// Where column i is kept, its place among the 32 banks changed so that a pass over bits 0-3, 4-7 or any higher ones
// meets each bank once: lanes differ in bits 4-8, in bits 0-3 and 8, or in bits 0-4.
BP_DEVICE int room_place(int i) {
    return i ^ (i >> 4 & 31);
}

template <Dtype D, bool Shared>
class InputTransformer {
  public:
    BP_DEVICE InputTransformer(const TransformInputArgs& args, float* room, int threads)
        : args_(args), room_(room), threads_(threads), thread_(static_cast<int>(ptx::thread())) {
        const size_t row = static_cast<size_t>(ptx::block()) * args.x_stride;
        x_ = static_cast<const char*>(args.x) + row * element_bytes(D);
    }

    // The transformed row into room, all but the order. Ends with a barrier.
    BP_DEVICE void transform(int odd, int log2) {
        if (args_.rotate && log2 > 0) {
            int shift = (log2 - 1) / 4 * 4;
            switch (log2 - shift) {
            case 1:
                first_pass<1>(shift, log2);
                break;
            case 2:
                first_pass<2>(shift, log2);
                break;
            case 3:
                first_pass<3>(shift, log2);
                break;
            default:
                first_pass<4>(shift, log2);
            }
            while (shift > 0) {
                BP_MUTATE(transform_missing_barrier, , ptx::sync_threads());
                shift -= 4;
                top_ = 0;
                pass<4>(shift, [&](int i) { return get(i); });
            }
        } else {
            for (int i = thread_; i < args_.n; i += threads_)
                put(i, input(i));
        }
        if (args_.rotate && odd > 1) {
            ptx::sync_threads();
            top_ = 0;
            const int width = args_.n / odd;
            if (odd <= 4)
                hartley<4>(odd, width);
            else if (odd <= 8)
                hartley<8>(odd, width);
            else
                hartley<16>(odd, width);
        }
        ptx::sync_threads();
    }

    // The largest magnitude that this thread put into the room last, as an integer: ordered as floats, NaN above all.
    BP_DEVICE uint32_t top() const { return top_; }

    // Columns i to i + 3 of the output, zero from n on.
    BP_DEVICE void four(int i, float (&values)[4]) const {
        BP_UNROLL
        for (int j = 0; j < 4; ++j)
            values[j] = i + j >= args_.n ? 0.0f : get(args_.order == nullptr ? i + j : args_.order[i + j]);
    }

  private:
    BP_DEVICE float get(int i) const {
        const float* at = room_ + room_place(i);
        if constexpr (Shared)
            return ptx::lds(at);
        else
            return *at;
    }

    BP_DEVICE void put(int i, float value) {
        top_ = ptx::max(top_, ptx::float_as_uint(value) & 0x7fffffffu);
        float* at = room_ + room_place(i);
        if constexpr (Shared)
            ptx::sts(at, value);
        else
            *at = value;
    }

    BP_DEVICE float input(int i) const {
        float value = load_element<D>(x_, i);
        if (args_.factors != nullptr)
            value *= args_.factors[i];
        if (args_.signs != nullptr)
            value = ptx::uint_as_float(ptx::float_as_uint(value) ^
                                       static_cast<uint32_t>(args_.signs[i / 8]) >> i % 8 << 31);
        return value;
    }

    template <int Bits>
    BP_DEVICE void first_pass(int shift, int log2) {
        // 1 / sqrt(2^log2): a power of two, and half the times the root of a half
        const float norm = ptx::uint_as_float(static_cast<uint32_t>(127 - log2 / 2) << 23) *
                           (log2 % 2 == 0 ? 1.0f : 0.70710678118654752f);
        pass<Bits>(shift, [&](int i) { return input(i) * norm; });
    }

    // Bits shift to shift + Bits - 1 of the column: sums and differences of the columns that differ in them.
    template <int Bits, class Read>
    BP_DEVICE void pass(int shift, Read read) {
        constexpr int values = 1 << Bits;
        for (int item = thread_; item < args_.n >> Bits; item += threads_) {
            const int first = item >> shift << (shift + Bits) | (item & ((1 << shift) - 1));
            float v[values];
            BP_UNROLL
            for (int j = 0; j < values; ++j)
                v[j] = read(first + (j << shift));
            BP_UNROLL
            for (int bit = 1; bit < values; bit *= 2)
                BP_UNROLL
            for (int j = 0; j < values; ++j)
                if ((j & bit) == 0) {
                    const float a = v[j], b = v[j | bit];
                    v[j] = a + b;
                    v[j | bit] = a - b;
                }
            BP_UNROLL
            for (int j = 0; j < values; ++j)
                put(first + (j << shift), v[j]);
        }
    }

    // The product with DHT_p down each of the `width` columns of the row seen as [p, width]. A thread makes Rows values
    // of a column. It reads the whole column, so all that share one wait for each other before they overwrite it.
    template <int Rows>
    BP_DEVICE void hartley(int p, int width) {
        const int parts = (p + Rows - 1) / Rows;
        const int together = threads_ / parts;
        const int64_t row = (p + transform_hartley_row - 1) / transform_hartley_row * transform_hartley_row;
        const int part = thread_ / together;
        for (int first = 0; first < width; first += together) {
            const int column = first + thread_ % together;
            const bool mine = part < parts && column < width;
            float sum[Rows] = {};
            if (mine)
                for (int i = 0; i < p; ++i) {
                    const float x = get(i * width + column);
                    const float* factors = args_.hartley + i * row + part * Rows; // symmetric: a column of it
                    BP_UNROLL
                    for (int r = 0; r < Rows; r += 4) {
                        const float4 f = *reinterpret_cast<const float4*>(factors + r);
                        sum[r] = ptx::fma(x, f.x, sum[r]);
                        sum[r + 1] = ptx::fma(x, f.y, sum[r + 1]);
                        sum[r + 2] = ptx::fma(x, f.z, sum[r + 2]);
                        sum[r + 3] = ptx::fma(x, f.w, sum[r + 3]);
                    }
                }
            if (parts > 1)
                BP_MUTATE(transform_in_place, , ptx::sync_threads());
            if (mine) {
                BP_UNROLL
                for (int r = 0; r < Rows; ++r)
                    if (part * Rows + r < p)
                        put((part * Rows + r) * width + column, sum[r]);
            }
        }
    }

    const TransformInputArgs& args_;
    const char* x_;
    float* room_;
    int threads_, thread_;
    uint32_t top_ = 0;
};

// Four bytes of columns 0, 2, 1, 3.
BP_DEVICE uint32_t pack_codes(const int32_t (&code)[4]) {
    const uint32_t even = ptx::prmt(static_cast<uint32_t>(code[0]), static_cast<uint32_t>(code[2]), 0x0040);
    const uint32_t odd = ptx::prmt(static_cast<uint32_t>(code[1]), static_cast<uint32_t>(code[3]), 0x0040);
    return ptx::prmt(even, odd, 0x5410);
}

constexpr int transform_reduce_words = 64; // one for each warp, of the maximum and of the sum

template <Dtype D, bool Shared>
BP_DEVICE void quantize_row(const TransformInputArgs& args, const InputTransformer<D, Shared>& row, uint32_t* reduce,
                            int threads) {
    const int thread = static_cast<int>(ptx::thread());
    const int lane = thread % 32, warp = thread / 32, warps = threads / 32;
    const int64_t token = ptx::block();
    const bool planes = args.output == TransformOutput::planes;

    const uint32_t warp_top = ptx::redux_max(row.top());
    if (lane == 0)
        reduce[warp] = warp_top;
    ptx::sync_threads();
    const float largest = ptx::uint_as_float(ptx::redux_max(lane < warps ? reduce[lane] : 0));
    const bool finite = largest <= FLT_MAX;
    const bool some = finite && largest >= 32512 * FLT_MIN; // or 32512 / largest overflows
    // not finite: codes are 0 as float_to_int(NaN) and 0 * value are
    const float inverse = some ? ptx::div(planes ? 32512.0f : 127.0f, largest) : 0.0f;

    int32_t sum = 0;
    for (int i = 4 * thread; i < args.stride; i += 4 * threads) {
        float values[4];
        row.four(i, values);
        int32_t code[4], high[4];
        BP_UNROLL
        for (int j = 0; j < 4; ++j) {
            code[j] = ptx::float_to_int(values[j] * inverse);
            high[j] = (code[j] + 128) >> 8; // what the low byte, as int8, leaves
            sum += code[j];
        }
        const int64_t at = token * args.stride + i;
        *reinterpret_cast<uint32_t*>(static_cast<int8_t*>(args.y) + at) = pack_codes(planes ? high : code);
        if (planes)
            *reinterpret_cast<uint32_t*>(args.low + at) = pack_codes(code);
    }
    const int32_t warp_sum = ptx::redux_add(sum);
    if (lane == 0)
        reduce[32 + warp] = static_cast<uint32_t>(warp_sum);
    ptx::sync_threads();
    if (warp == 0) {
        const int32_t total = ptx::redux_add(lane < warps ? static_cast<int32_t>(reduce[32 + lane]) : 0);
        if (lane == 0) {
            args.sum[token] = total;
            args.scale[token] = some ? ptx::div(largest, 127.0f) : finite ? 0.0f : ptx::uint_as_float(0x7fffffffu);
        }
    }
}

// threads: of the block. odd, log2: n = odd * 2^log2.
template <Dtype D, bool Shared>
BP_GLOBAL void BP_LAUNCH_BOUNDS(transform_most_threads, 1)
    transform_input_kernel(const TransformInputArgs args, int threads, int odd, int log2) {
    BP_DYNAMIC_SHARED(shared);
    uint32_t* reduce = reinterpret_cast<uint32_t*>(shared);
    float* room = reinterpret_cast<float*>(reduce + transform_reduce_words);
    if constexpr (!Shared)
        room = args.workspace + ptx::block() * transform_input_room(args.n);
    InputTransformer<D, Shared> row(args, room, threads);
    row.transform(odd, log2);
    if (args.output != TransformOutput::same) {
        quantize_row<D, Shared>(args, row, reduce, threads);
        return;
    }
    const int64_t start = static_cast<int64_t>(ptx::block()) * args.stride;
    for (int i = 4 * static_cast<int>(ptx::thread()); i < args.stride; i += 4 * threads) {
        float values[4];
        row.four(i, values);
        store_four<D>(args.y, start + i, values);
    }
}

// 0 or a cudaError_t; nothing is launched for no tokens. std::invalid_argument where the sizes do not fit together.
int transform_input(const TransformInputArgs& args, void* stream);

} // namespace bitpalette
