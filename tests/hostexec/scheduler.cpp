// In which order threads run. Hardware promises none, so all of these must give the right result.
#include "core.h"

#include <algorithm>
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
namespace {

constexpr long patience = 100000; // rounds in which all that ran was spinning

std::vector<std::unique_ptr<Block>> idle; // with their stacks, for the next block of the same size
std::vector<std::unique_ptr<Block>> finished;

void thread_body() {
    Fibre::arrived();
    order_acquire(&machine.launch_order);
    (*machine.body)();
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
    ++machine.progress;
    order_release(&machine.end_order);
    me.fibre.switch_to(machine.scheduler, true);
    std::abort();
}

bool start(Block& block, unsigned index) {
    block.index = index;
    block.barriers = {};
    block.threads.resize(machine.block_threads);
    block.warps.resize((machine.block_threads + 31) / 32);
    block.live = machine.block_threads;
    block.memory = allocate_shared(machine.shared_bytes);
    if (block.memory == nullptr)
        return false;
    for (unsigned i = 0; i < block.warps.size(); ++i) {
        Warp& warp = block.warps[i];
        const unsigned lanes = std::min(32u, machine.block_threads - 32 * i);
        warp.block = &block;
        warp.first = 32 * i;
        warp.ready = lanes == 32 ? ~0u : (1u << lanes) - 1;
        warp.exited = ~warp.ready; // there never were any
        warp.spinning = warp.arrived = 0;
    }
    for (unsigned i = 0; i < machine.block_threads; ++i) {
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
    order_release(&machine.launch_order);
    return true;
}

void run(Thread& thread) {
    running = &thread;
    current = {thread.index, thread.block->index, machine.grid_blocks, shared_of(thread.block->memory)};
    machine.scheduler.switch_to(thread.fibre);
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
        if (machine.failed)
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
    machine.message[0] = 0;
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
    machine.failed = true;
}

} // namespace

void run_blocks(const std::vector<unsigned>& order) {
    std::vector<std::unique_ptr<Block>> resident;
    size_t next = 0, cursor = 0;
    long spun = 0, seen = machine.progress;
    while (!machine.failed) {
        for (auto& block : resident)
            if (block->live == 0) {
                if (!shared_intact(block->memory)) {
                    std::snprintf(machine.message, sizeof machine.message,
                                  "block %u wrote outside its %zu bytes of shared memory", block->index,
                                  machine.shared_bytes);
                    machine.failed = true;
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
        while (!machine.failed && resident.size() < static_cast<size_t>(options.coresident) && next < order.size()) {
            std::unique_ptr<Block> block;
            if (idle.empty())
                block = std::make_unique<Block>();
            else {
                block = std::move(idle.back());
                idle.pop_back();
            }
            if (!start(*block, order[next++])) {
                std::snprintf(machine.message, sizeof machine.message, "no memory for %u threads",
                              machine.block_threads);
                machine.failed = true;
            }
            resident.push_back(std::move(block));
        }
        if (machine.failed || resident.empty())
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
        spun = machine.progress == seen ? spun + 1 : 0;
        seen = machine.progress;
        const unsigned unstarted = static_cast<unsigned>(order.size() - next);
        if (!spinning)
            deadlock(resident, "deadlock", unstarted);
        else if (spun > patience)
            deadlock(resident, "livelock, nothing that is spun for changes", unstarted);
    }
    for (auto& block : resident)
        finished.push_back(std::move(block));
    order_acquire(&machine.end_order);
    for (auto& done : finished)
        free_shared(std::exchange(done->memory, nullptr));
    finished.clear();
}

void forget_blocks() {
    idle.clear();
}

} // namespace hostexec
