// The twins of csrc/cuda/ptx.cuh, in its order. A collective takes one more argument than on the device, the line it is
// called from.
#pragma once

#include "hostexec.h"
#include "small_float.h"

#include <cmath>
#include <cstring>
#include <type_traits>

#define BP_DEVICE inline
#define BP_HOST_DEVICE inline
#define BP_GLOBAL
#define BP_LAUNCH_BOUNDS(threads, blocks)
#define BP_UNROLL
#define BP_ROLLED
#define BP_DYNAMIC_SHARED(name) uint8_t* const name = ::hostexec::current.shared

// CUDA's vector types, with CUDA's alignment
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) {
    return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}
inline int2 make_int2(int x, int y) {
    return {x, y};
}
inline int4 make_int4(int x, int y, int z, int w) {
    return {x, y, z, w};
}
inline float2 make_float2(float x, float y) {
    return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
    return {x, y, z, w};
}

namespace bitpalette::ptx {

using ::hostexec::Op;
using ::hostexec::Where;

BP_DEVICE unsigned thread() {
    return ::hostexec::current.thread;
}
BP_DEVICE unsigned lane() {
    return thread() % 32;
}
BP_DEVICE unsigned warp() {
    return thread() / 32;
}
BP_DEVICE unsigned block() {
    return ::hostexec::current.block;
}
BP_DEVICE unsigned blocks() {
    return ::hostexec::current.blocks;
}

BP_DEVICE void cp_async16(void* shared, const void* global, bool valid, Where where = Where::here()) {
    ::hostexec::async_copy16(shared, global, valid, where);
}
BP_DEVICE void cp_async16_once(void* shared, const void* global, bool valid, Where where = Where::here()) {
    ::hostexec::async_copy16(shared, global, valid, where);
}
BP_DEVICE void cp_async_commit() {
    ::hostexec::async_commit();
}
template <int N>
BP_DEVICE void cp_async_wait() {
    ::hostexec::async_wait(N);
}

BP_DEVICE void sync_threads(Where where = Where::here()) {
    ::hostexec::barrier(where);
}
BP_DEVICE void sync_warp(Where where = Where::here()) {
    ::hostexec::collective(Op::sync_warp, nullptr, 0, nullptr, 0, where);
}
BP_DEVICE void named_sync(int barrier, int threads, Where where = Where::here()) {
    ::hostexec::named_barrier(barrier, threads, true, where);
}
BP_DEVICE void named_arrive(int barrier, int threads, Where where = Where::here()) {
    ::hostexec::named_barrier(barrier, threads, false, where);
}

// a[4], b[2], c[4] in this order
template <class T>
BP_DEVICE void mma(Op op, T (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where) {
    uint32_t in[10];
    for (int i = 0; i < 4; ++i)
        in[i] = a[i];
    for (int i = 0; i < 2; ++i)
        in[4 + i] = b[i];
    std::memcpy(in + 6, c, sizeof c);
    ::hostexec::collective(op, in, 10, c, 4, where);
}
BP_DEVICE void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where = Where::here()) {
    mma(Op::mma_f16, c, a, b, where);
}
BP_DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where = Where::here()) {
    mma(Op::mma_bf16, c, a, b, where);
}
BP_DEVICE void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where = Where::here()) {
    mma(Op::mma_s8, c, a, b, where);
}
BP_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row, Where where = Where::here()) {
    ::hostexec::ldmatrix_x4(r, row, where);
}

BP_DEVICE uint32_t movmatrix(uint32_t a, Where where = Where::here()) {
    uint32_t d;
    ::hostexec::collective(Op::movmatrix, &a, 1, &d, 1, where);
    return d;
}

BP_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    uint32_t d = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t nibble = selector >> 4 * i & 15;
        const uint32_t byte = bytes >> 8 * (nibble & 7) & 255;
        d |= (nibble & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
    }
    return d;
}
template <int Lut>
BP_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d = 0;
    for (int row = 0; row < 8; ++row)
        if (Lut >> row & 1)
            d |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
    return d;
}
BP_DEVICE uint32_t funnel_right(uint32_t lo, uint32_t hi, uint32_t shift) {
    return static_cast<uint32_t>((static_cast<uint64_t>(hi) << 32 | lo) >> (shift & 31));
}
BP_DEVICE int keep(int value) {
    return value;
}
BP_DEVICE int clz(uint32_t a) {
    return a ? __builtin_clz(a) : 32;
}
BP_DEVICE int popc(uint32_t a) {
    return __builtin_popcount(a);
}
BP_DEVICE uint32_t mul_hi(uint32_t a, uint32_t b) {
    return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}

// Byte i of a word, read as T
template <class T>
BP_DEVICE uint32_t byte_of(uint32_t word, int i) {
    return static_cast<uint32_t>(static_cast<int32_t>(static_cast<T>(word >> 8 * i & 255)));
}
template <class A, class B>
BP_DEVICE uint32_t dp4a(uint32_t a, uint32_t b, uint32_t c) {
    for (int i = 0; i < 4; ++i)
        c += byte_of<A>(a, i) * byte_of<B>(b, i);
    return c;
}
BP_DEVICE uint32_t dp4a_uu(uint32_t a, uint32_t b, uint32_t c) {
    return dp4a<uint8_t, uint8_t>(a, b, c);
}
BP_DEVICE int32_t dp4a_us(uint32_t a, int32_t b, int32_t c) {
    return static_cast<int32_t>(dp4a<uint8_t, int8_t>(a, static_cast<uint32_t>(b), static_cast<uint32_t>(c)));
}
BP_DEVICE int32_t dp4a_ss(int32_t a, int32_t b, int32_t c) {
    return static_cast<int32_t>(
        dp4a<int8_t, int8_t>(static_cast<uint32_t>(a), static_cast<uint32_t>(b), static_cast<uint32_t>(c)));
}

BP_DEVICE uint32_t add_f16x2(uint32_t a, uint32_t b) {
    return ::hostexec::fma_pair<::hostexec::Half>(a, 0x3c003c00u, b);
}
BP_DEVICE uint32_t sub_f16x2(uint32_t a, uint32_t b) {
    return ::hostexec::fma_pair<::hostexec::Half>(b, 0xbc00bc00u, a);
}
BP_DEVICE uint32_t mul_f16x2(uint32_t a, uint32_t b) {
    return ::hostexec::fma_pair<::hostexec::Half>(a, b, 0x80008000u);
}
BP_DEVICE uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
    return ::hostexec::fma_pair<::hostexec::Half>(a, b, c);
}

BP_DEVICE uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
    return ::hostexec::fma_pair<::hostexec::Bfloat>(a, b, c);
}
BP_DEVICE uint32_t add_bf16x2(uint32_t a, uint32_t b) {
    return fma_bf16x2(a, 0x3f803f80u, b);
}
BP_DEVICE uint32_t sub_bf16x2(uint32_t a, uint32_t b) {
    return fma_bf16x2(b, 0xbf80bf80u, a);
}
BP_DEVICE uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
    return fma_bf16x2(a, b, 0x80008000u);
}

BP_DEVICE uint32_t float_as_uint(float a) {
    return ::hostexec::bits_of<uint32_t>(a);
}
BP_DEVICE float uint_as_float(uint32_t a) {
    return ::hostexec::bits_of<float>(a);
}
BP_DEVICE float f16_to_float(uint16_t a) {
    return static_cast<float>(::hostexec::decode<::hostexec::Half>(a));
}
BP_DEVICE float bf16_to_float(uint16_t a) {
    return uint_as_float(static_cast<uint32_t>(a) << 16);
}
BP_DEVICE uint16_t float_to_f16(float a) {
    return ::hostexec::encode<::hostexec::Half>(a);
}
BP_DEVICE uint16_t float_to_bf16(float a) {
    return ::hostexec::encode<::hostexec::Bfloat>(a);
}
BP_DEVICE uint32_t pack_f16x2(float lo, float hi) {
    return static_cast<uint32_t>(float_to_f16(hi)) << 16 | float_to_f16(lo);
}
BP_DEVICE uint32_t pack_bf16x2(float lo, float hi) {
    return static_cast<uint32_t>(float_to_bf16(hi)) << 16 | float_to_bf16(lo);
}
BP_DEVICE float2 unpack_f16x2(uint32_t a) {
    return {f16_to_float(static_cast<uint16_t>(a)), f16_to_float(static_cast<uint16_t>(a >> 16))};
}
BP_DEVICE float2 unpack_bf16x2(uint32_t a) {
    return {uint_as_float(a << 16), uint_as_float(a & 0xffff0000u)};
}
BP_DEVICE int32_t float_to_int(float a) {
    if (a != a)
        return 0;
    if (a >= 2147483648.f)
        return INT32_MAX;
    if (a <= -2147483648.f)
        return INT32_MIN;
    return static_cast<int32_t>(std::nearbyintf(a));
}
BP_DEVICE float int_to_float(int32_t a) {
    return static_cast<float>(a);
}

BP_DEVICE float add(float a, float b) {
    return a + b; // built with -ffp-contract=off
}
BP_DEVICE float mul(float a, float b) {
    return a * b;
}
BP_DEVICE float fma(float a, float b, float c) {
    return std::fmaf(a, b, c);
}
BP_DEVICE float div(float a, float b) {
    return a / b;
}
BP_DEVICE float min(float a, float b) {
    return std::fminf(a, b);
}
BP_DEVICE float max(float a, float b) {
    return std::fmaxf(a, b);
}
BP_DEVICE int32_t min(int32_t a, int32_t b) {
    return a < b ? a : b;
}
BP_DEVICE int32_t max(int32_t a, int32_t b) {
    return a < b ? b : a;
}
BP_DEVICE uint32_t min(uint32_t a, uint32_t b) {
    return a < b ? a : b;
}
BP_DEVICE uint32_t max(uint32_t a, uint32_t b) {
    return a < b ? b : a;
}
BP_DEVICE float abs(float a) {
    return std::fabs(a);
}
BP_DEVICE float exp2_approx(float a) {
    return ::hostexec::flush(std::exp2f(::hostexec::flush(a)));
}
BP_DEVICE float rsqrt_approx(float a) {
    return ::hostexec::flush(1.f / std::sqrt(::hostexec::flush(a)));
}
BP_DEVICE float rcp_approx(float a) {
    return ::hostexec::flush(1.f / ::hostexec::flush(a));
}
BP_DEVICE float exp_approx(float a) {
    return exp2_approx(a * 1.44269504f);
}

BP_DEVICE double sqrt_rn(double a) {
    return std::sqrt(a);
}

// One word from every lane, one word back
template <class T>
BP_DEVICE T exchange(Op op, T value, int operand, Where where) {
    const uint32_t in[2] = {::hostexec::bits_of<uint32_t>(value), static_cast<uint32_t>(operand)};
    uint32_t out;
    ::hostexec::collective(op, in, 2, &out, 1, where);
    return ::hostexec::bits_of<T>(out);
}
BP_DEVICE uint32_t shfl(uint32_t value, int from, Where where = Where::here()) {
    return exchange(Op::shfl, value, from, where);
}
BP_DEVICE float shfl(float value, int from, Where where = Where::here()) {
    return exchange(Op::shfl, value, from, where);
}
BP_DEVICE uint32_t shfl_down(uint32_t value, int delta, Where where = Where::here()) {
    return exchange(Op::shfl_down, value, delta, where);
}
BP_DEVICE float shfl_down(float value, int delta, Where where = Where::here()) {
    return exchange(Op::shfl_down, value, delta, where);
}
BP_DEVICE uint32_t shfl_xor(uint32_t value, int mask, Where where = Where::here()) {
    return exchange(Op::shfl_xor, value, mask, where);
}
BP_DEVICE float shfl_xor(float value, int mask, Where where = Where::here()) {
    return exchange(Op::shfl_xor, value, mask, where);
}
BP_DEVICE uint32_t ballot(bool value, Where where = Where::here()) {
    return exchange(Op::ballot, static_cast<uint32_t>(value), 0, where);
}
BP_DEVICE int32_t redux_add(int32_t value, Where where = Where::here()) {
    return exchange(Op::redux_add, value, 0, where);
}
BP_DEVICE uint32_t redux_max(uint32_t value, Where where = Where::here()) {
    return exchange(Op::redux_max, value, 0, where);
}
BP_DEVICE uint32_t redux_min(uint32_t value, Where where = Where::here()) {
    return exchange(Op::redux_min, value, 0, where);
}

BP_DEVICE unsigned atomic_add(unsigned* p, unsigned value) {
    ::hostexec::progress(false);
    return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
}
BP_DEVICE void fence() {
    ::hostexec::fence();
}
BP_DEVICE unsigned ld_acquire(const unsigned* p, Where where = Where::here()) {
    ::hostexec::spin(where);
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
BP_DEVICE void st_release(unsigned* p, unsigned value) {
    ::hostexec::progress(true);
    __atomic_store_n(p, value, __ATOMIC_RELEASE);
}
BP_DEVICE uint32_t ld_cg(const uint32_t* p) {
    return *p;
}
BP_DEVICE void st_cg(uint32_t* p, uint32_t value) {
    *p = value;
}
BP_DEVICE uint4 ld_stream128(const void* global) {
    return *static_cast<const uint4*>(global);
}
template <class T>
BP_DEVICE T lds(const T* shared, Where where = Where::here()) {
    static_assert(sizeof(T) <= 16 && std::is_trivially_copyable_v<T>);
    ::hostexec::shared_access(shared, sizeof(T), false, where);
    return *shared;
}
template <class T>
BP_DEVICE void sts(T* shared, T value, Where where = Where::here()) {
    static_assert(sizeof(T) <= 16 && std::is_trivially_copyable_v<T>);
    ::hostexec::shared_access(shared, sizeof(T), true, where);
    *shared = value;
}

} // namespace bitpalette::ptx
