// Runs a kernel's own source, compiled by g++, on one CPU core: a fibre for every thread of a block, switched where
// threads meet. What it is for: wrong results, races, deadlocks, divergence, copies nobody waited for and misaligned
// addresses show on a machine without a GPU. What it is not: hardware. See docs in tests/hostexec/README.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace hostexec {

// A line of the kernel. As a default argument it is the line of the call.
struct Where {
    const char* file;
    int line;
    static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

// What all lanes of a warp do together. Operands and results of a lane are words, `words[op]` in the core.
enum class Op {
    sync_warp,
    shfl,
    shfl_down,
    shfl_xor,
    ballot,
    redux_add,
    redux_max,
    redux_min,
    ldmatrix_x4,
    movmatrix,
    mma_f16,
    mma_bf16,
    mma_s8
};

// The thread that runs now. Only the core writes it.
struct Current {
    unsigned thread, block, blocks;
    uint8_t* shared;
};
extern Current current;

// Waits for the other 31 lanes at the same op and line, then: out[0 .. outs) from what all lanes gave in in[0 .. ins).
void collective(Op op, const void* in, int ins, void* out, int outs, Where where);
void ldmatrix_x4(void* out, const void* row, Where where);

void barrier(Where where);
void named_barrier(int barrier, int threads, bool wait, Where where);

void async_copy16(void* shared, const void* global, bool valid, Where where);
void async_commit();
void async_wait(int groups);

// Spinning: lets others run, and fails when there is nobody left who could end the wait.
void spin(Where where);
void progress(bool release); // what a spinning thread may wait for is about to change
void fence();

// Counts the bank conflicts of an access of one lane; fails if it is out of the block's shared memory or misaligned.
void shared_access(const void* address, size_t bytes, bool store, Where where);

// The launch itself: `body` is run by every thread. 0, or cudaErrorLaunchFailure (719) with error() to read.
int launch(const std::function<void()>& body, unsigned grid, unsigned block, size_t shared_bytes);
int resident_blocks();
// Of the last launch; empty if all went well.
const char* error();

} // namespace hostexec
