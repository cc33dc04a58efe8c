// A stack of its own to run on, and the switch between two of them.
//
// On x86-64 the switch is written out: swapcontext makes two system calls each time, which made a rendezvous of a warp
// eleven times as slow. Elsewhere, or with HOSTEXEC_UCONTEXT, it is swapcontext. Both sanitizers are told.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <sys/mman.h>
#include <vector>

#if !defined(__x86_64__) && !defined(HOSTEXEC_UCONTEXT)
#define HOSTEXEC_UCONTEXT
#endif
#ifdef HOSTEXEC_UCONTEXT
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef HOSTEXEC_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" {
void __tsan_read_range(void* address, unsigned long size);
void __tsan_write_range(void* address, unsigned long size);
void __tsan_func_entry(void* pc);
void __tsan_func_exit();
}
#endif

namespace hostexec {

// ThreadSanitizer sees the block's threads as concurrent and only what is said here as ordered.
inline void order_release(void* at) {
#ifdef HOSTEXEC_TSAN
    __tsan_release(at);
#else
    (void)at;
#endif
}
inline void order_acquire(void* at) {
#ifdef HOSTEXEC_TSAN
    __tsan_acquire(at);
#else
    (void)at;
#endif
}

#ifndef HOSTEXEC_UCONTEXT
// Pushes the callee-saved registers, swaps the stack pointers, pops. hidden: one in each library.
extern "C" void hostexec_switch(void** from, void* to) __attribute__((visibility("hidden")));
#endif

class Fibre {
  public:
    // The fibre that the caller already is: the scheduler's.
    Fibre() = default;
    Fibre(const Fibre&) = delete;
    Fibre& operator=(const Fibre&) = delete;
    ~Fibre() {
#ifdef HOSTEXEC_TSAN
        if (base_ != nullptr && tsan_ != nullptr)
            __tsan_destroy_fiber(tsan_);
#endif
        if (base_ != nullptr)
            munmap(base_, guard + bytes);
    }

    // Will run `entry`, which never returns, at the next switch here. May be called again for another run.
    bool prepare(void (*entry)()) {
        if (base_ == nullptr) {
            void* base = mmap(nullptr, guard + bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (base == MAP_FAILED || mprotect(base, guard, PROT_NONE) != 0)
                return false;
            base_ = static_cast<uint8_t*>(base);
#ifdef HOSTEXEC_TSAN
            tsan_ = __tsan_create_fiber(0);
#endif
        }
#ifdef __SANITIZE_ADDRESS__
        // the frames of a run that was given up are still marked
        __asan_unpoison_memory_region(base_ + guard, bytes);
        fake_ = nullptr;
#endif
#ifdef HOSTEXEC_UCONTEXT
        getcontext(&context_);
        context_.uc_stack.ss_sp = base_ + guard;
        context_.uc_stack.ss_size = bytes;
        context_.uc_link = nullptr;
        makecontext(&context_, entry, 0);
#else
        // what a call leaves: a return address at 8 modulo 16, here none; then where `ret` goes, then six registers
        void** top = reinterpret_cast<void**>(base_ + guard + bytes);
        *--top = nullptr;
        *--top = reinterpret_cast<void*>(entry);
        for (int i = 0; i < 6; ++i)
            *--top = nullptr;
        stack_ = top;
#endif
        return true;
    }

    // Runs `to` until it switches back. `last`: this fibre will not be run again before a prepare().
    void switch_to(Fibre& to, bool last = false) {
#ifdef __SANITIZE_ADDRESS__
        __sanitizer_start_switch_fiber(last ? nullptr : &fake_, to.bottom(), to.size());
        arriving = &to;
        leaving = this;
#endif
        (void)last;
#ifdef HOSTEXEC_TSAN
        if (tsan_ == nullptr)
            tsan_ = __tsan_get_current_fiber();
        __tsan_switch_to_fiber(to.tsan_, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef HOSTEXEC_UCONTEXT
        swapcontext(&context_, &to.context_);
#else
        hostexec_switch(&stack_, to.stack_);
#endif
        arrived();
    }

    // The first thing on a new stack.
    static void arrived() {
#ifdef __SANITIZE_ADDRESS__
        const void* bottom;
        size_t size;
        __sanitizer_finish_switch_fiber(arriving->fake_, &bottom, &size);
        if (leaving->base_ == nullptr) { // the scheduler's own stack, which only the sanitizer knows
            leaving->own_bottom_ = bottom;
            leaving->own_bytes_ = size;
        }
#endif
    }

  private:
    static constexpr size_t guard = 4096, bytes = 256 * 1024;

    uint8_t* base_ = nullptr;
#ifdef HOSTEXEC_UCONTEXT
    ucontext_t context_;
#else
    void* stack_ = nullptr;
#endif
#ifdef HOSTEXEC_TSAN
    void* tsan_ = nullptr;
#endif
#ifdef __SANITIZE_ADDRESS__
    const void* bottom() const { return base_ == nullptr ? own_bottom_ : base_ + guard; }
    size_t size() const { return base_ == nullptr ? own_bytes_ : bytes; }
    void* fake_ = nullptr;
    const void* own_bottom_ = nullptr;
    size_t own_bytes_ = 0;
    static inline Fibre *arriving = nullptr, *leaving = nullptr;
#endif
};

} // namespace hostexec
