// Where threads meet: the lanes of a warp, the barriers of a block, flags between blocks.
#include "core.h"

namespace hostexec {
namespace {

// Addresses to order by. ThreadSanitizer knows no fences: here all of them are as if ordered by one lock, so that it
// may miss a race for a fence that has nothing to do with it, and never reports one that is none.
char fence_order, release_order;

// Word by word: the library's memcpy is one of the things ThreadSanitizer watches, also from here.
void copy_words(void* to, const void* from, int words) {
    for (int i = 0; i < words; ++i)
        __builtin_memcpy(static_cast<char*>(to) + 4 * i, static_cast<const char*>(from) + 4 * i, 4);
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

void wait_here(const char* what, Where where) {
    Thread& me = *running;
    me.what = what;
    me.where = where;
    me.fibre.switch_to(machine.scheduler);
}

void make_ready(Thread& thread) {
    thread.warp->ready |= bit_of(thread);
}

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
    arrive(running->block->barriers[0], 0, static_cast<int>(machine.block_threads), true, "sync_threads", where);
}

void named_barrier(int barrier, int threads, bool wait, Where where) {
    const char* const what = wait ? "named_sync" : "named_arrive";
    if (barrier < 1 || barrier > 15)
        fail(where, "%s: barrier %d is none of 1 to 15", what, barrier);
    if (threads <= 0 || threads % 32 != 0 || threads > static_cast<int>(machine.block_threads))
        fail(where, "%s: %d threads are not whole warps of a block of %u", what, threads, machine.block_threads);
    arrive(running->block->barriers[barrier], barrier, threads, wait, what, where);
}

void spin(Where where) {
    running->warp->spinning |= bit_of(*running);
    wait_here("ld_acquire", where);
    order_acquire(&fence_order); // what is read may have been written behind a fence
}

void progress(bool release) {
    ++machine.progress;
    if (release)
        order_release(&release_order);
}

void fence() {
    order_acquire(&fence_order);
    order_acquire(&release_order); // what was read before it may have been a release
    order_release(&fence_order);
}

} // namespace hostexec
