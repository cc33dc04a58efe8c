// The vocabulary of every kernel: one instruction, one wrapper. The only file with inline assembly or intrinsics.
//
// All of it is sm_80, so it runs on everything newer. Pointers are generic; a wrapper converts where its instruction
// wants an address of shared or global memory. fp16 and bf16 values travel in pairs in a uint32_t, the first of the
// pair (the lower address) in the low half.
//
// The same kernel source is also compiled by g++ and run on a CPU by the executor of tests/hostexec, which is why
// kernels may use nothing but this file: with BITPALETTE_HOST_EXECUTOR the wrappers come from
// tests/hostexec/ptx_host.h. Every name below has its twin there (tests/hostexec/test_vocabulary.py). For the
// executor a collective (barrier, shuffle, ldmatrix, mma, redux) is known by its line: write one to a source line.
#pragma once

#include <cstddef>
#include <cstdint>

// BP_MUTATE(name, broken, right) is `right`. It marks a place where the tests put a bug and want it found: with
// -D'BITPALETTE_MUTATE_name=~,' in a build for the executor it is `broken`.
#ifdef BITPALETTE_HOST_EXECUTOR
#define BP_SECOND(first, second, ...) second
#define BP_SECOND_OF(...) BP_SECOND(__VA_ARGS__)
#define BP_MUTATE(name, broken, right) BP_SECOND_OF(BITPALETTE_MUTATE_##name broken, right, )
#else
#define BP_MUTATE(name, broken, right) right
#endif

#ifdef BITPALETTE_HOST_EXECUTOR

#include "ptx_host.h"

#else

#define BP_DEVICE __device__ __forceinline__
#define BP_HOST_DEVICE __host__ __device__ __forceinline__
#define BP_GLOBAL __global__
#define BP_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define BP_UNROLL _Pragma("unroll")
#define BP_ROLLED _Pragma("unroll 1")
// uint8_t* NAME to the dynamic shared memory of the block; 128 bytes are one row of the 32 banks
#define BP_DYNAMIC_SHARED(name)                                                                                        \
    extern __shared__ __align__(128) uint8_t bp_dynamic_shared[];                                                      \
    uint8_t* const name = bp_dynamic_shared

namespace bitpalette::ptx {

// --- where a thread is; launches are one-dimensional

BP_DEVICE unsigned thread() {
    return threadIdx.x;
}
BP_DEVICE unsigned lane() {
    return threadIdx.x % 32;
}
BP_DEVICE unsigned warp() {
    return threadIdx.x / 32;
}
BP_DEVICE unsigned block() {
    return blockIdx.x;
}
BP_DEVICE unsigned blocks() {
    return gridDim.x;
}

BP_DEVICE unsigned shared_address(const void* shared) {
    return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// --- copies from global to shared memory that no thread waits for

// 16 bytes past the L1, both addresses aligned to 16. Not valid: 16 zeros, and `global` is not read.
BP_DEVICE void cp_async16(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
                 : "memory");
}
// The same for what is read once, as weights are: first to leave the L2, where the activations should stay.
BP_DEVICE void cp_async16_once(void* shared, const void* global, bool valid) {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared_address(shared)),
                 "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0), "l"(policy)
                 : "memory");
}
// The copies of this thread since the last commit become one group, also if there are none.
BP_DEVICE void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until at most N groups of this thread are under way. What other threads copied needs a barrier behind it.
template <int N>
BP_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// --- barriers

BP_DEVICE void sync_threads() {
    __syncthreads();
}
BP_DEVICE void sync_warp() {
    __syncwarp();
}
// Barrier 1 to 15 among `threads` threads of the block, whole warps. 0 is that of sync_threads.
BP_DEVICE void named_sync(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// Counted in, but does not wait: the producer's half of named_sync.
BP_DEVICE void named_arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// --- matrix instructions; c += a b. Fragments as PTX has them: lane 4 g + t. volatile: never into a branch

// A 16x16 row major, a[0] = (g; 2t, 2t+1), a[1] = (g+8; ..), a[2] = (g; 2t+8, 2t+9), a[3] = (g+8; ..). B 16x8,
// b[0] = (2t, 2t+1; g), b[1] = (2t+8, 2t+9; g). C 16x8, c[0], c[1] = (g; 2t, 2t+1), c[2], c[3] = (g+8; ..).
BP_DEVICE void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
BP_DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// A 16x32 of int8: a[0] = (g; 4t..4t+3), a[1] = (g+8; ..), a[2] = (g; 4t+16..), a[3] = (g+8; ..). B 32x8,
// b[0] = (4t..4t+3; g), b[1] = (4t+16..; g). C as above; sums wrap around.
BP_DEVICE void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Four 8x8 matrices of 16-bit values. Lane 8 i + j gives the address of row j of matrix i, 16 bytes aligned to 16;
// r[i] of lane 4 g + t is (g; 2t, 2t+1) of matrix i.
BP_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Transposes an 8x8 matrix of 16-bit values: lane 4 g + t gives (g; 2t, 2t+1) and gets (2t, 2t+1; g).
BP_DEVICE uint32_t movmatrix(uint32_t a) {
    uint32_t d;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
    return d;
}

// --- bits

// Four bytes out of the eight of b:a. Nibble i of the selector: which, and with its bit 3 that byte's sign 8 times.
BP_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
    return d;
}
// Any function of three bits: Lut is it of a = 0xf0, b = 0xcc, c = 0xaa.
template <int Lut>
BP_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(Lut));
    return d;
}
// The low 32 bits of hi:lo >> (shift & 31).
BP_DEVICE uint32_t funnel_right(uint32_t lo, uint32_t hi, uint32_t shift) {
    uint32_t d;
    asm("shf.r.wrap.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(lo), "r"(hi), "r"(shift));
    return d;
}
// Leading zeros, 32 of 0.
BP_DEVICE int clz(uint32_t a) {
    int d;
    asm("clz.b32 %0, %1;" : "=r"(d) : "r"(a));
    return d;
}
BP_DEVICE int popc(uint32_t a) {
    int d;
    asm("popc.b32 %0, %1;" : "=r"(d) : "r"(a));
    return d;
}
BP_DEVICE uint32_t mul_hi(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("mul.hi.u32 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

// The same value, of which the compiler does not know how it came about: it stays in a register, where else its sums
// and products would be computed anew in every round of a loop.
BP_DEVICE int keep(int value) {
    asm("" : "+r"(value));
    return value;
}

// --- c + the sum of four products of bytes; u or s: how the bytes of a, then of b, are read

BP_DEVICE uint32_t dp4a_uu(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("dp4a.u32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
BP_DEVICE int32_t dp4a_us(uint32_t a, int32_t b, int32_t c) {
    int32_t d;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
BP_DEVICE int32_t dp4a_ss(int32_t a, int32_t b, int32_t c) {
    int32_t d;
    asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// --- pairs of fp16, rounded to nearest even. The .rn is what keeps ptxas from fusing a product with a sum.

BP_DEVICE uint32_t add_f16x2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
BP_DEVICE uint32_t sub_f16x2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
BP_DEVICE uint32_t mul_f16x2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
// a b + c, rounded once
BP_DEVICE uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// --- pairs of bf16. Before sm_90 there is only the fma; with 1, -1 and -0 it gives the others to the last bit.

BP_DEVICE uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
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

// --- conversions; to 16 bits rounded to nearest even, beyond the range infinite

BP_DEVICE uint32_t pack_f16x2(float lo, float hi) {
    uint32_t d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
    return d;
}
BP_DEVICE uint32_t pack_bf16x2(float lo, float hi) {
    uint32_t d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
    return d;
}
BP_DEVICE float2 unpack_f16x2(uint32_t a) {
    float2 d;
    asm("{\n.reg .b16 lo, hi;\nmov.b32 {lo, hi}, %2;\ncvt.f32.f16 %0, lo;\ncvt.f32.f16 %1, hi;\n}"
        : "=f"(d.x), "=f"(d.y)
        : "r"(a));
    return d;
}
BP_DEVICE uint32_t float_as_uint(float a) {
    return __float_as_uint(a);
}
BP_DEVICE float uint_as_float(uint32_t a) {
    return __uint_as_float(a);
}
BP_DEVICE float2 unpack_bf16x2(uint32_t a) {
    return make_float2(uint_as_float(a << 16), uint_as_float(a & 0xffff0000u));
}
BP_DEVICE float f16_to_float(uint16_t a) {
    float d;
    asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(a));
    return d;
}
BP_DEVICE float bf16_to_float(uint16_t a) {
    return uint_as_float(static_cast<uint32_t>(a) << 16);
}
// By the conversion of a pair, F2FP: that of a single value is F2F, which goes through the slow conversion unit.
BP_DEVICE uint16_t float_to_f16(float a) {
    return static_cast<uint16_t>(pack_f16x2(a, 0.f));
}
BP_DEVICE uint16_t float_to_bf16(float a) {
    return static_cast<uint16_t>(pack_bf16x2(a, 0.f));
}
// To nearest even; beyond int32 the nearest int32, of NaN 0.
BP_DEVICE int32_t float_to_int(float a) {
    int32_t d;
    asm("cvt.rni.s32.f32 %0, %1;" : "=r"(d) : "f"(a));
    return d;
}
BP_DEVICE float int_to_float(int32_t a) {
    float d;
    asm("cvt.rn.f32.s32 %0, %1;" : "=f"(d) : "r"(a));
    return d;
}

// --- fp32. add and mul are not fused with what follows them; the operators + and * may be.

BP_DEVICE float add(float a, float b) {
    return __fadd_rn(a, b);
}
BP_DEVICE float mul(float a, float b) {
    return __fmul_rn(a, b);
}
BP_DEVICE float fma(float a, float b, float c) {
    return __fmaf_rn(a, b, c);
}
BP_DEVICE float div(float a, float b) {
    return __fdiv_rn(a, b);
}
// Of one NaN and a number, the number.
BP_DEVICE float min(float a, float b) {
    return fminf(a, b);
}
BP_DEVICE float max(float a, float b) {
    return fmaxf(a, b);
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
    return fabsf(a);
}
// The approximations: 2 units in the last place, 1 for rcp; denormal numbers are zero.
BP_DEVICE float exp2_approx(float a) {
    float d;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(a));
    return d;
}
BP_DEVICE float rsqrt_approx(float a) {
    float d;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(a));
    return d;
}
BP_DEVICE float rcp_approx(float a) {
    float d;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(a));
    return d;
}
BP_DEVICE float exp_approx(float a) {
    return exp2_approx(a * 1.44269504f);
}

// --- fp64

BP_DEVICE double sqrt_rn(double a) {
    return __dsqrt_rn(a);
}

// --- among the 32 lanes of a warp, all of which take part

// What lane `from % 32` has.
BP_DEVICE uint32_t shfl(uint32_t value, int from) {
    return __shfl_sync(0xffffffffu, value, from);
}
BP_DEVICE float shfl(float value, int from) {
    return __shfl_sync(0xffffffffu, value, from);
}
// What the lane `delta` further up has, or the own where there is none.
BP_DEVICE uint32_t shfl_down(uint32_t value, int delta) {
    return __shfl_down_sync(0xffffffffu, value, delta);
}
BP_DEVICE float shfl_down(float value, int delta) {
    return __shfl_down_sync(0xffffffffu, value, delta);
}
BP_DEVICE uint32_t shfl_xor(uint32_t value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
BP_DEVICE float shfl_xor(float value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
// Bit i: what lane i says.
BP_DEVICE uint32_t ballot(bool value) {
    return __ballot_sync(0xffffffffu, value);
}
// The sum, greatest or least of 32 lanes, in all of them: one instruction.
BP_DEVICE int32_t redux_add(int32_t value) {
    return __reduce_add_sync(0xffffffffu, value);
}
BP_DEVICE uint32_t redux_max(uint32_t value) {
    return __reduce_max_sync(0xffffffffu, value);
}
BP_DEVICE uint32_t redux_min(uint32_t value) {
    return __reduce_min_sync(0xffffffffu, value);
}

// --- memory

// To *p adds value and returns what was there. Orders nothing else: use fence().
BP_DEVICE unsigned atomic_add(unsigned* p, unsigned value) {
    return atomicAdd(p, value);
}
// What this thread wrote before it (or saw written) is seen by whoever sees what it writes after it. Device wide.
BP_DEVICE void fence() {
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
}
// The only read a kernel may spin on.
BP_DEVICE unsigned ld_acquire(const unsigned* p) {
    unsigned d;
    asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(d) : "l"(p) : "memory");
    return d;
}
BP_DEVICE void st_release(unsigned* p, unsigned value) {
    asm volatile("st.release.gpu.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}
// By way of the L2 alone: what another block wrote, once a fence and an atomic operation say that it has.
BP_DEVICE uint32_t ld_cg(const uint32_t* p) {
    uint32_t d;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(d) : "l"(__cvta_generic_to_global(p)) : "memory");
    return d;
}
BP_DEVICE void st_cg(uint32_t* p, uint32_t value) {
    asm volatile("st.global.cg.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "r"(value) : "memory");
}
// 16 bytes of global memory that nobody writes during the kernel and that are read once: not kept in the L1.
BP_DEVICE uint4 ld_stream128(const void* global) {
    uint4 d;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
        : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w)
        : "l"(__cvta_generic_to_global(global)));
    return d;
}
// Reads and writes of shared memory as any other, for uint32_t, uint2, uint4 and float: here the executor counts bank
// conflicts and checks range and alignment, which it cannot where a kernel follows a pointer.
template <class T>
BP_DEVICE T lds(const T* shared) {
    return *shared;
}
template <class T>
BP_DEVICE void sts(T* shared, T value) {
    *shared = value;
}

} // namespace bitpalette::ptx

#endif
