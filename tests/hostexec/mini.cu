// One instruction a kernel, to be compared with other sources (test_conformance.py), and right uses of what can be
// misused (test_schedules.py).
#include "launch.cuh"

#include <utility>

namespace bitpalette {

using namespace ptx;

enum class Mma { f16, bf16, s8 };

// a [32, 4], b [32, 2], c [32, 4]: registers of the lanes
template <Mma Kind>
BP_GLOBAL void mma_kernel(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* d) {
    const unsigned me = thread();
    uint32_t ra[4], rb[2];
    for (int i = 0; i < 4; ++i)
        ra[i] = a[4 * me + i];
    for (int i = 0; i < 2; ++i)
        rb[i] = b[2 * me + i];
    if constexpr (Kind == Mma::s8) {
        int32_t rc[4];
        for (int i = 0; i < 4; ++i)
            rc[i] = static_cast<int32_t>(c[4 * me + i]);
        mma_s8(rc, ra, rb);
        for (int i = 0; i < 4; ++i)
            d[4 * me + i] = static_cast<uint32_t>(rc[i]);
    } else {
        float rc[4];
        for (int i = 0; i < 4; ++i)
            rc[i] = uint_as_float(c[4 * me + i]);
        if constexpr (Kind == Mma::f16)
            mma_f16(rc, ra, rb);
        else
            mma_bf16(rc, ra, rb);
        for (int i = 0; i < 4; ++i)
            d[4 * me + i] = float_as_uint(rc[i]);
    }
}

// The block's shared memory is `data`; lane i gives the row at offsets[i].
template <int Unused>
BP_GLOBAL void ldmatrix_kernel(const uint8_t* data, int bytes, const int* offsets, uint32_t* out) {
    BP_DYNAMIC_SHARED(shared);
    for (int i = static_cast<int>(thread()); i < bytes; i += 32)
        shared[i] = data[i];
    sync_threads();
    uint32_t r[4];
    ldmatrix_x4(r, shared + offsets[thread()]);
    for (int i = 0; i < 4; ++i)
        out[4 * thread() + i] = r[i];
}

// lds or sts of T at offsets[lane]; for the counter of conflicts
template <class T>
BP_GLOBAL void banks_kernel(const int* offsets, int store) {
    BP_DYNAMIC_SHARED(shared);
    T* const at = reinterpret_cast<T*>(shared + offsets[thread()]);
    if (store)
        sts(at, T{});
    else
        (void)lds(at);
}

template <int... Lut>
BP_DEVICE uint32_t lop3_of(int lut, uint32_t a, uint32_t b, uint32_t c, std::integer_sequence<int, Lut...>) {
    uint32_t d = 0;
    ((lut == Lut ? (d = lop3<Lut>(a, b, c), void()) : void()), ...);
    return d;
}
// a, b, c [n] -> out [256, n]
template <int Unused>
BP_GLOBAL void lop3_kernel(int n, const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* out) {
    for (int lut = 0; lut < 256; ++lut)
        for (int i = static_cast<int>(thread()); i < n; i += 32)
            out[lut * n + i] = lop3_of(lut, a[i], b[i], c[i], std::make_integer_sequence<int, 256>());
}

enum class Word {
    prmt,
    funnel_right,
    clz,
    popc,
    mul_hi,
    dp4a_uu,
    dp4a_us,
    dp4a_ss,
    add_f16x2,
    sub_f16x2,
    mul_f16x2,
    fma_f16x2,
    add_bf16x2,
    sub_bf16x2,
    mul_bf16x2,
    fma_bf16x2,
    pack_f16x2,
    pack_bf16x2,
    float_to_f16,
    float_to_bf16,
    f16_to_float,
    bf16_to_float,
    float_to_int,
    int_to_float,
    exp2_approx,
    rsqrt_approx,
    rcp_approx
};

BP_DEVICE uint32_t word_of(Word op, uint32_t a, uint32_t b, uint32_t c) {
    const float x = uint_as_float(a), y = uint_as_float(b);
    const int32_t ia = static_cast<int32_t>(a), ib = static_cast<int32_t>(b), ic = static_cast<int32_t>(c);
    switch (op) {
    case Word::prmt:
        return prmt(a, b, c);
    case Word::funnel_right:
        return funnel_right(a, b, c);
    case Word::clz:
        return static_cast<uint32_t>(clz(a));
    case Word::popc:
        return static_cast<uint32_t>(popc(a));
    case Word::mul_hi:
        return mul_hi(a, b);
    case Word::dp4a_uu:
        return dp4a_uu(a, b, c);
    case Word::dp4a_us:
        return static_cast<uint32_t>(dp4a_us(a, ib, ic));
    case Word::dp4a_ss:
        return static_cast<uint32_t>(dp4a_ss(ia, ib, ic));
    case Word::add_f16x2:
        return add_f16x2(a, b);
    case Word::sub_f16x2:
        return sub_f16x2(a, b);
    case Word::mul_f16x2:
        return mul_f16x2(a, b);
    case Word::fma_f16x2:
        return fma_f16x2(a, b, c);
    case Word::add_bf16x2:
        return add_bf16x2(a, b);
    case Word::sub_bf16x2:
        return sub_bf16x2(a, b);
    case Word::mul_bf16x2:
        return mul_bf16x2(a, b);
    case Word::fma_bf16x2:
        return fma_bf16x2(a, b, c);
    case Word::pack_f16x2:
        return pack_f16x2(x, y);
    case Word::pack_bf16x2:
        return pack_bf16x2(x, y);
    case Word::float_to_f16:
        return float_to_f16(x);
    case Word::float_to_bf16:
        return float_to_bf16(x);
    case Word::f16_to_float:
        return float_as_uint(f16_to_float(static_cast<uint16_t>(a)));
    case Word::bf16_to_float:
        return float_as_uint(bf16_to_float(static_cast<uint16_t>(a)));
    case Word::float_to_int:
        return static_cast<uint32_t>(float_to_int(x));
    case Word::int_to_float:
        return float_as_uint(int_to_float(ia));
    case Word::exp2_approx:
        return float_as_uint(exp2_approx(x));
    case Word::rsqrt_approx:
        return float_as_uint(rsqrt_approx(x));
    case Word::rcp_approx:
        return float_as_uint(rcp_approx(x));
    }
    return 0;
}

template <int Unused>
BP_GLOBAL void words_kernel(Word op, int n, const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* out) {
    for (int i = static_cast<int>(thread()); i < n; i += 32)
        out[i] = word_of(op, a[i], b[i], c[i]);
}

// in [32] -> out [7, 32]
template <int Unused>
BP_GLOBAL void lanes_kernel(const uint32_t* in, int operand, uint32_t* out) {
    const unsigned me = thread();
    const uint32_t value = in[me];
    out[me] = shfl(value, operand);
    out[32 + me] = shfl_down(value, operand);
    out[64 + me] = shfl_xor(value, operand);
    out[96 + me] = ballot(value & 1);
    out[128 + me] = static_cast<uint32_t>(redux_add(static_cast<int32_t>(value)));
    out[160 + me] = redux_max(value);
    out[192 + me] = redux_min(value);
}

// Warp 0 fills, the others (of two named barriers) take; `rounds` times over one buffer.
template <int Unused>
BP_GLOBAL void producer_kernel(uint32_t* out, int rounds) {
    BP_DYNAMIC_SHARED(shared);
    uint32_t* const buffer = reinterpret_cast<uint32_t*>(shared);
    uint32_t sum = 0;
    for (int round = 0; round < rounds; ++round) {
        if (warp() == 0) {
            if (round > 0)
                named_sync(2, 64); // taken
            buffer[lane()] = static_cast<uint32_t>(round + 1) * (lane() + 1);
            named_arrive(1, 64); // filled
        } else {
            named_sync(1, 64);
            sum += buffer[31 - lane()];
            if (round + 1 < rounds)
                named_arrive(2, 64);
        }
    }
    if (warp() == 1)
        out[lane()] = sum;
}

enum class HandOff { release, fenced, unfenced };

// Every block adds what it has to its neighbour's sum, in order: block b waits until b blocks are done.
template <HandOff Kind>
BP_GLOBAL void chain_kernel(uint32_t* sums, unsigned* done) {
    if (thread() == 0)
        while (ld_acquire(done) != block()) {
        }
    sync_threads();
    sums[thread()] += block() + thread();
    sync_threads();
    if (thread() == 0) {
        if constexpr (Kind == HandOff::release) {
            st_release(done, block() + 1);
        } else {
            if constexpr (Kind == HandOff::fenced)
                fence();
            atomic_add(done, 1);
        }
    }
}

// The last block to come sums what all have written.
template <HandOff Kind>
BP_GLOBAL void last_block_kernel(uint32_t* parts, unsigned* done, uint32_t* sum) {
    BP_DYNAMIC_SHARED(shared);
    unsigned* const last = reinterpret_cast<unsigned*>(shared);
    parts[block() * 32 + thread()] = block() * 100 + thread();
    sync_threads();
    if (thread() == 0) {
        if constexpr (Kind == HandOff::fenced)
            fence();
        *last = atomic_add(done, 1) == blocks() - 1;
        if constexpr (Kind == HandOff::fenced)
            fence();
    }
    sync_threads();
    if (*last) {
        uint32_t all = 0;
        for (unsigned i = 0; i < blocks(); ++i)
            all += parts[i * 32 + thread()];
        sum[thread()] = all;
    }
}

} // namespace bitpalette

using namespace bitpalette;

extern "C" {

int run_mma(int kind, const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* d) {
    const auto kernel = kind == 0 ? mma_kernel<Mma::f16> : kind == 1 ? mma_kernel<Mma::bf16> : mma_kernel<Mma::s8>;
    return launch(kernel, 1, 32, 0, nullptr, a, b, c, d);
}
// many of them: a, b, c, d one behind the other
int run_mmas(int kind, int count, const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* d) {
    for (int i = 0; i < count; ++i)
        if (const int error = run_mma(kind, a + 128 * i, b + 64 * i, c + 128 * i, d + 128 * i))
            return error;
    return 0;
}
int run_ldmatrix(const uint8_t* data, int bytes, const int* offsets, uint32_t* out) {
    return launch(ldmatrix_kernel<0>, 1, 32, static_cast<size_t>(bytes), nullptr, data, bytes, offsets, out);
}
int run_banks(int size, const int* offsets, int store, int bytes) {
    const auto kernel = size == 4 ? banks_kernel<uint32_t> : size == 8 ? banks_kernel<uint2> : banks_kernel<uint4>;
    return launch(kernel, 1, 32, static_cast<size_t>(bytes), nullptr, offsets, store);
}
int run_lop3(int n, const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* out) {
    return launch(lop3_kernel<0>, 1, 32, 0, nullptr, n, a, b, c, out);
}
int run_words(int op, int n, const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* out) {
    return launch(words_kernel<0>, 1, 32, 0, nullptr, static_cast<Word>(op), n, a, b, c, out);
}
int run_lanes(const uint32_t* in, int operand, uint32_t* out) {
    return launch(lanes_kernel<0>, 1, 32, 0, nullptr, in, operand, out);
}
int run_producer(uint32_t* out, int rounds) {
    return launch(producer_kernel<0>, 1, 64, 128, nullptr, out, rounds);
}
int run_chain(int kind, int blocks, uint32_t* sums, unsigned* done) {
    const auto kernel = kind == 0   ? chain_kernel<HandOff::release>
                        : kind == 1 ? chain_kernel<HandOff::fenced>
                                    : chain_kernel<HandOff::unfenced>;
    return launch(kernel, static_cast<unsigned>(blocks), 32, 0, nullptr, sums, done);
}
int run_last_block(int kind, int blocks, uint32_t* parts, unsigned* done, uint32_t* sum) {
    const auto kernel = kind == 1 ? last_block_kernel<HandOff::fenced> : last_block_kernel<HandOff::unfenced>;
    return launch(kernel, static_cast<unsigned>(blocks), 32, 4, nullptr, parts, done, sum);
}
}
