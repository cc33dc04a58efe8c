// Threads, the order in which they run, and where they meet.
#include "core.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <utility>

#ifndef HOSTEXEC_UCONTEXT
asm(R"(
.text
.globl hostexec_switch
.hidden hostexec_switch
.type hostexec_switch, @function
hostexec_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size hostexec_switch, .-hostexec_switch
)");
#endif

namespace hostexec {

Options options;
Current current{};
Thread* running = nullptr;

namespace {

constexpr int launch_failure = 719, invalid_configuration = 9, out_of_memory = 2; // cudaError_t
constexpr size_t most_shared = 227 * 1024; // of a block on sm_90; sm_80 has 163 KiB, sm_86 and sm_89 99
constexpr unsigned most_threads = 1024;
constexpr long patience = 100000; // rounds in which all that ran was spinning

char message[2048];
bool failed = false;
uint64_t random_state = 0;
long progress_count = 0;
Fibre scheduler;
const std::function<void()>* body = nullptr;
unsigned grid_blocks = 0, block_threads = 0;
char launch_order, end_order, fence_order; // addresses to order by
std::vector<std::unique_ptr<Block>> idle;  // with their stacks, for the next block of the same size
std::vector<std::unique_ptr<Block>> finished;

void say(const char* format, ...) __attribute__((format(printf, 1, 2)));
void say(const char* format, ...) {
    const size_t used = std::strlen(message);
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(message + used, sizeof message - used, format, arguments);
    va_end(arguments);
}

uint32_t bit_of(const Thread& thread) {
    return 1u << thread.index % 32;
}

[[noreturn]] void give_up() {
    failed = true;
    running->fibre.switch_to(scheduler, true);
    std::abort(); // never resumed
}

void thread_body() {
    Fibre::arrived();
    order_acquire(&launch_order);
    (*body)();
    Thread& me = *running;
    if (me.copy_count != 0)
        fail(me.copies[me.first_copy].where, "thread exits with %zu cp.async not waited for, the first from this line",
             me.copy_count);
    Warp& warp = *me.warp;
    if (warp.arrived != 0)
        fail(warp.where, "thread exits while lanes of its warp wait in %s at this line", name(warp.op));
    warp.exited |= bit_of(me);
    me.done = true;
    --me.block->live;
    ++progress_count;
    order_release(&end_order);
    me.fibre.switch_to(scheduler, true);
    std::abort();
}

bool start(Block& block, unsigned index) {
    block.index = index;
    block.barriers = {};
    block.threads.resize(block_threads);
    block.warps.resize((block_threads + 31) / 32);
    block.live = block_threads;
    block.memory = allocate_shared(shared_bytes);
    if (block.memory == nullptr)
        return false;
    for (unsigned i = 0; i < block.warps.size(); ++i) {
        Warp& warp = block.warps[i];
        const unsigned lanes = std::min(32u, block_threads - 32 * i);
        warp.block = &block;
        warp.first = 32 * i;
        warp.ready = lanes == 32 ? ~0u : (1u << lanes) - 1;
        warp.exited = ~warp.ready; // there never were any
        warp.spinning = warp.arrived = 0;
    }
    for (unsigned i = 0; i < block_threads; ++i) {
        if (block.threads[i] == nullptr)
            block.threads[i] = std::make_unique<Thread>();
        Thread& thread = *block.threads[i];
        thread.block = &block;
        thread.warp = &block.warps[i / 32];
        thread.index = i;
        thread.done = false;
        thread.barrier = -1;
        thread.copies.resize(Thread::most_copies); // all memory comes from here, not from a fibre
        thread.first_copy = thread.copy_count = 0;
        thread.group = 0;
        thread.accesses.clear();
        if (!thread.fibre.prepare(thread_body))
            return false;
    }
    order_release(&launch_order);
    return true;
}

void run(Thread& thread) {
    running = &thread;
    current = {thread.index, thread.block->index, grid_blocks, shared_of(thread.block->memory)};
    scheduler.switch_to(thread.fibre);
}

// Every ready lane once, until it waits.
void turn(Warp& warp) {
    std::array<int, 32> order;
    std::iota(order.begin(), order.end(), 0);
    if (options.schedule == Schedule::reverse || options.schedule == Schedule::greedy_high)
        std::reverse(order.begin(), order.end());
    if (options.schedule == Schedule::random)
        for (int i = 31; i > 0; --i)
            std::swap(order[i], order[next_random() % (i + 1)]);
    const uint32_t lanes = warp.ready;
    for (const int lane : order) {
        if (!(lanes >> lane & 1))
            continue;
        warp.ready &= ~(1u << lane);
        run(*warp.block->threads[warp.first + lane]);
        if (failed)
            return;
    }
}

Warp* pick(const std::vector<std::unique_ptr<Block>>& resident, size_t& cursor) {
    static std::vector<Warp*> warps;
    warps.clear();
    for (const auto& block : resident)
        for (Warp& warp : block->warps)
            warps.push_back(&warp);
    const size_t n = warps.size();
    const auto ready = [&](size_t i) { return warps[i]->ready != 0; };
    switch (options.schedule) {
    case Schedule::forward:
        for (size_t step = 0; step < n; ++step)
            if (const size_t i = (cursor + step) % n; ready(i)) {
                cursor = i + 1;
                return warps[i];
            }
        return nullptr;
    case Schedule::reverse:
        for (size_t step = 0; step < n; ++step)
            if (const size_t i = n - 1 - (cursor + step) % n; ready(i)) {
                cursor = n - i;
                return warps[i];
            }
        return nullptr;
    case Schedule::greedy_low:
        for (size_t i = 0; i < n; ++i)
            if (ready(i))
                return warps[i];
        return nullptr;
    case Schedule::greedy_high:
        for (size_t i = n; i-- > 0;)
            if (ready(i))
                return warps[i];
        return nullptr;
    case Schedule::random: {
        size_t count = 0;
        for (size_t i = 0; i < n; ++i)
            if (ready(i))
                warps[count++] = warps[i];
        return count == 0 ? nullptr : warps[next_random() % count];
    }
    }
    return nullptr;
}

// Nobody can run. Who waits where, the most common places first.
void deadlock(const std::vector<std::unique_ptr<Block>>& resident, const char* kind, unsigned unstarted) {
    struct Place {
        const Thread* first;
        int threads;
    };
    std::vector<Place> places;
    unsigned exited = 0;
    bool at_barrier = false;
    for (const auto& block : resident)
        for (const auto& thread : block->threads) {
            exited += thread->done;
            if (thread->done)
                continue;
            at_barrier |= thread->barrier == 0;
            const auto place = std::find_if(places.begin(), places.end(), [&](const Place& p) {
                return same_place(p.first->where, thread->where) && std::strcmp(p.first->what, thread->what) == 0;
            });
            if (place == places.end())
                places.push_back({thread.get(), 1});
            else
                ++place->threads;
        }
    std::stable_sort(places.begin(), places.end(),
                     [](const Place& a, const Place& b) { return a.threads > b.threads; });
    message[0] = 0;
    say("%s%s:", kind, exited != 0 && at_barrier ? ", exit before a barrier" : "");
    for (size_t i = 0; i < places.size() && i < 6; ++i) {
        const Thread& first = *places[i].first;
        say("%s %d thread%s in %s at %s:%d (block %u thread %u%s)", i == 0 ? "" : ",", places[i].threads,
            places[i].threads == 1 ? "" : "s", first.what, base_name(first.where.file), first.where.line,
            first.block->index, first.index, places[i].threads == 1 ? "" : " the first");
    }
    if (exited != 0)
        say(", %u exited", exited);
    if (unstarted != 0)
        say(", %u blocks not started (coresident %d)", unstarted, options.coresident);
    failed = true;
}

void schedule(const std::vector<unsigned>& order) {
    std::vector<std::unique_ptr<Block>> resident;
    size_t next = 0, cursor = 0;
    long spun = 0, seen = progress_count;
    while (!failed) {
        for (auto& block : resident)
            if (block->live == 0) {
                if (!shared_intact(block->memory)) {
                    std::snprintf(message, sizeof message, "block %u wrote outside its %zu bytes of shared memory",
                                  block->index, shared_bytes);
                    failed = true;
                }
                count_leftover();
                finished.push_back(std::move(block));
            }
        resident.erase(std::remove(resident.begin(), resident.end(), nullptr), resident.end());
#ifndef HOSTEXEC_TSAN // there, what one block left would be ordered before what the next finds
        for (auto& block : finished) {
            free_shared(std::exchange(block->memory, nullptr));
            idle.push_back(std::move(block));
        }
        finished.clear();
#endif
        while (!failed && resident.size() < static_cast<size_t>(options.coresident) && next < order.size()) {
            std::unique_ptr<Block> block;
            if (idle.empty())
                block = std::make_unique<Block>();
            else {
                block = std::move(idle.back());
                idle.pop_back();
            }
            if (!start(*block, order[next++])) {
                std::snprintf(message, sizeof message, "no memory for %u threads", block_threads);
                failed = true;
            }
            resident.push_back(std::move(block));
        }
        if (failed || resident.empty())
            break;
        Warp* const warp = pick(resident, cursor);
        if (warp != nullptr) {
            turn(*warp);
            continue;
        }
        bool spinning = false;
        for (auto& block : resident)
            for (Warp& other : block->warps) {
                spinning |= other.spinning != 0;
                other.ready |= std::exchange(other.spinning, 0);
            }
        spun = progress_count == seen ? spun + 1 : 0;
        seen = progress_count;
        const unsigned unstarted = static_cast<unsigned>(order.size() - next);
        if (!spinning)
            deadlock(resident, "deadlock", unstarted);
        else if (spun > patience)
            deadlock(resident, "livelock, nothing that is spun for changes", unstarted);
    }
    for (auto& block : resident)
        finished.push_back(std::move(block));
}

void arrive(Barrier& barrier, int id, int expected, bool wait, const char* what, Where where) {
    Thread& me = *running;
    if (barrier.arrived == 0) {
        barrier.expected = expected;
        barrier.where = where;
    } else if (barrier.expected != expected)
        fail(where, "%s %d: for %d threads here, for %d at %s:%d", what, id, expected, barrier.expected,
             base_name(barrier.where.file), barrier.where.line);
    else if (id == 0 && !same_place(barrier.where, where))
        fail(where, "divergent barrier: other threads wait in %s at %s:%d", what, base_name(barrier.where.file),
             barrier.where.line);
    char* const order = &barrier.order[barrier.generation & 1];
    order_release(order);
    if (++barrier.arrived == expected) {
        barrier.arrived = 0;
        ++barrier.generation;
        for (auto& thread : me.block->threads)
            if (thread->barrier == id) {
                thread->barrier = -1;
                make_ready(*thread);
            }
    } else if (wait) {
        me.barrier = id;
        wait_here(what, where);
    }
    if (wait)
        order_acquire(order);
}

} // namespace

const char* base_name(const char* path) {
    const char* const slash = std::strrchr(path, '/');
    return slash == nullptr ? path : slash + 1;
}

bool same_place(Where a, Where b) {
    return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

uint64_t next_random() { // splitmix64, Steele, Lea and Flood 2014
    uint64_t z = random_state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

void fail(Where where, const char* text, ...) {
    message[0] = 0;
    say("%s:%d: block %u thread %u: ", base_name(where.file), where.line, running->block->index, running->index);
    const size_t used = std::strlen(message);
    va_list arguments;
    va_start(arguments, text);
    std::vsnprintf(message + used, sizeof message - used, text, arguments);
    va_end(arguments);
    give_up();
}

void wait_here(const char* what, Where where) {
    Thread& me = *running;
    me.what = what;
    me.where = where;
    me.fibre.switch_to(scheduler);
}

void make_ready(Thread& thread) {
    thread.warp->ready |= bit_of(thread);
}

namespace {
// Word by word: the library's memcpy is one of the things ThreadSanitizer watches, also from here.
void copy_words(void* to, const void* from, int words) {
    for (int i = 0; i < words; ++i)
        __builtin_memcpy(static_cast<char*>(to) + 4 * i, static_cast<const char*>(from) + 4 * i, 4);
}
} // namespace

void collective(Op op, const void* in, int ins, void* out, int outs, Where where) {
    Thread& me = *running;
    Warp& warp = *me.warp;
    if (warp.exited != 0)
        fail(where, "%s needs all 32 lanes, but lane %d has exited or never was", name(op), __builtin_ctz(warp.exited));
    if (warp.arrived == 0) {
        warp.op = op;
        warp.where = where;
    } else if (warp.op != op || !same_place(warp.where, where))
        fail(where, "warp divergence: lane %u comes to %s while lanes wait in %s at %s:%d", me.index % 32, name(op),
             name(warp.op), base_name(warp.where.file), warp.where.line);
    Warp::Slot& slot = warp.slots[me.index % 32];
    copy_words(slot.in.data(), in, ins);
    char* const order = &warp.order[warp.collectives & 1];
    if (op == Op::sync_warp) // the only one that orders memory
        order_release(order);
    warp.arrived |= bit_of(me);
    if (warp.arrived == ~0u) {
        execute(op, warp.slots);
        if (op == Op::ldmatrix_x4)
            count_ldmatrix(warp.slots, where);
        warp.arrived = 0;
        ++warp.collectives;
        warp.ready |= ~bit_of(me);
    } else
        wait_here(name(op), where);
    if (op == Op::sync_warp)
        order_acquire(order);
    copy_words(out, slot.out.data(), outs);
}

void barrier(Where where) {
    arrive(running->block->barriers[0], 0, static_cast<int>(block_threads), true, "sync_threads", where);
}

void named_barrier(int barrier, int threads, bool wait, Where where) {
    const char* const what = wait ? "named_sync" : "named_arrive";
    if (barrier < 1 || barrier > 15)
        fail(where, "%s: barrier %d is none of 1 to 15", what, barrier);
    if (threads <= 0 || threads % 32 != 0 || threads > static_cast<int>(block_threads))
        fail(where, "%s: %d threads are not whole warps of a block of %u", what, threads, block_threads);
    arrive(running->block->barriers[barrier], barrier, threads, wait, what, where);
}

void spin(Where where) {
    running->warp->spinning |= bit_of(*running);
    wait_here("ld_acquire", where);
}

void progress() {
    ++progress_count;
}

// ThreadSanitizer knows no fences: as if all of them were ordered by one lock. It may miss a race for that, never
// report one that is none.
void fence() {
    order_acquire(&fence_order);
    order_release(&fence_order);
}

int launch(const std::function<void()>& kernel, unsigned grid, unsigned block, size_t bytes) {
    message[0] = 0;
    failed = false;
    if (grid == 0 || block == 0 || block > most_threads || bytes > most_shared) {
        std::snprintf(
            message, sizeof message,
            "invalid configuration: %u blocks of %u threads with %zu bytes of shared memory (1 to %u threads, "
            "at most %zu bytes)",
            grid, block, bytes, most_threads, most_shared);
        return invalid_configuration;
    }
#ifdef HOSTEXEC_TSAN
    // a fibre takes it close to a megabyte, and none is used twice
    if (static_cast<uint64_t>(grid) * block > 4096) {
        std::snprintf(message, sizeof message,
                      "ThreadSanitizer has room for 4096 threads, not %u blocks of %u: use a smaller shape", grid,
                      block);
        return out_of_memory;
    }
#endif
    if (block != block_threads)
        idle.clear();
    body = &kernel;
    grid_blocks = grid;
    block_threads = block;
    shared_bytes = bytes;
    random_state = options.seed;
    std::vector<unsigned> order(grid); // hardware promises none
    std::iota(order.begin(), order.end(), 0u);
    if (options.schedule == Schedule::reverse || options.schedule == Schedule::greedy_high)
        std::reverse(order.begin(), order.end());
    if (options.schedule == Schedule::random)
        for (size_t i = grid - 1; i > 0; --i)
            std::swap(order[i], order[next_random() % (i + 1)]);
    schedule(order);
    order_acquire(&end_order);
    for (auto& done : finished)
        free_shared(std::exchange(done->memory, nullptr));
    finished.clear();
    running = nullptr;
    body = nullptr;
    return failed ? launch_failure : 0;
}

int resident_blocks() {
    return options.coresident;
}

} // namespace hostexec

extern "C" {

void hostexec_configure(int schedule, unsigned long long seed, int copies, int coresident, int conflicts) {
    hostexec::options = {static_cast<hostexec::Schedule>(schedule), seed, static_cast<hostexec::Copies>(copies),
                         coresident, conflicts != 0};
    hostexec::forget_conflicts();
    hostexec::message[0] = 0;
}

// Of the last launch; empty if all went well.
const char* hostexec_error() {
    return hostexec::message;
}

// Lines "file line which accesses extra" since the options were set. How many bytes; at most size - 1 are written.
int hostexec_conflicts(char* out, int size) {
    const std::string text = hostexec::conflicts_text();
    std::snprintf(out, static_cast<size_t>(size), "%s", text.c_str());
    return static_cast<int>(text.size());
}
}
