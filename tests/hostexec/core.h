// What the parts of the executor share: threads, warps, blocks. Not seen by kernels.
//
// Never built with -fsanitize=thread, unlike the kernels: what happens in here is the machine, not the program.
#pragma once

#include "fibre.h"
#include "hostexec.h"

#include <array>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace hostexec {

enum class Schedule { forward, reverse, greedy_low, greedy_high, random };
enum class Copies { lazy, eager, mixed };

struct Options {
    Schedule schedule = Schedule::forward;
    uint64_t seed = 0;
    Copies copies = Copies::lazy;
    int coresident = 1;     // blocks alive at a time
    bool conflicts = false; // counted for lds and sts too
};
extern Options options;

struct Copy {
    void* shared;
    const void* global;
    bool valid, pending;
    long group;
    Where where;
};

struct Block;
struct Warp;

struct Thread {
    Fibre fibre;
    Block* block = nullptr;
    Warp* warp = nullptr;
    unsigned index = 0;
    bool done = false;
    int barrier = -1; // waits there
    const char* what = nullptr;
    Where where{};                             // of the wait
    static constexpr size_t most_copies = 512; // not yet waited for
    std::vector<Copy> copies;                  // a ring
    size_t first_copy = 0, copy_count = 0;
    long group = 0; // the open one: that many are committed
    std::vector<std::pair<Where, long>> accesses;
};

struct Warp {
    struct Slot {
        std::array<uint32_t, 10> in;
        std::array<uint32_t, 4> out;
    };
    std::array<Slot, 32> slots;
    Block* block = nullptr;
    unsigned first = 0; // thread
    uint32_t ready = 0, spinning = 0, exited = 0;
    uint32_t arrived = 0; // at the collective
    Op op{};
    Where where{};
    long collectives = 0;
    char order[2] = {}; // addresses to order by, for sync_warp; in turn, so that none orders what is behind it
};

struct Barrier {
    int arrived = 0, expected = 0;
    Where where{};
    long generation = 0;
    char order[2] = {};
};

struct Block {
    unsigned index = 0;
    std::vector<std::unique_ptr<Thread>> threads;
    std::vector<Warp> warps;
    std::array<Barrier, 16> barriers;
    uint8_t* memory = nullptr; // with what lies around the shared memory
    unsigned live = 0;
};

// The launch under way.
struct Machine {
    char message[2048]; // what went wrong
    bool failed;
    long progress; // of what a spinning thread may wait for
    Fibre scheduler;
    const std::function<void()>* body; // what every thread runs
    unsigned grid_blocks, block_threads;
    size_t shared_bytes;          // of a block
    char launch_order, end_order; // addresses to order by
};
extern Machine machine;
extern Thread* running;

// The error of the launch: `text` for the running thread at `where`. Does not return; the launch ends.
[[noreturn]] void fail(Where where, const char* text, ...) __attribute__((format(printf, 2, 3)));
void say(const char* format, ...) __attribute__((format(printf, 1, 2))); // appended to the message
const char* base_name(const char* path);
bool same_place(Where a, Where b);
const char* name(Op op);
// Until another thread (or the scheduler) makes this one ready again.
void wait_here(const char* what, Where where);
void make_ready(Thread& thread);
inline uint32_t bit_of(const Thread& thread) {
    return 1u << thread.index % 32;
}
void seed_random(uint64_t seed);
uint64_t next_random();

// All blocks in that order, as many at a time as may be alive, until they are done or one has failed.
void run_blocks(const std::vector<unsigned>& order);
void forget_blocks(); // and their stacks

// One op, all 32 lanes there: from slots[].in to slots[].out.
void execute(Op op, std::array<Warp::Slot, 32>& slots);

uint8_t* allocate_shared(size_t bytes); // the memory of a block; Block::memory
uint8_t* shared_of(uint8_t* memory);
bool shared_intact(const uint8_t* memory);
void free_shared(uint8_t* memory);
// [address, address + bytes) lies in the block's shared memory and is aligned to bytes
void check_shared(const void* address, size_t bytes, const char* what, Where where);
void count_ldmatrix(const std::array<Warp::Slot, 32>& slots, Where where);
void count_leftover(); // accesses that fewer than 32 lanes made
void forget_conflicts();
std::string conflicts_text();

} // namespace hostexec
