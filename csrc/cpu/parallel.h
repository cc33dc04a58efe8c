// Splitting work over threads: those of the OpenMP runtime that torch has loaded, where it can be called, so that
// there is one pool and never two that fight; else threads of our own (thread_pool.h).
//
// Torch's runtime keeps its threads looking for work after a call. A second pool finds its cores taken then, and the
// other way round: 4-bit layers between torch operations, two threads on two cores, took 1.5 to 5 times as long as on
// one thread with a second pool, 0.55 to 1 times with torch's.
//
// A process that was forked has none of its parent's threads, and libgomp waits for them for ever. So in a child that
// was forked after this module was loaded, all is done by threads of our own, made anew.
//
// Any number of threads may call at the same time. The pool works for one of them; who comes while it does computes on
// the thread that called, so T threads for each of N callers are never N * T.
#pragma once

#include <cstdint>

namespace bitpalette {

// Entry points of a loaded OpenMP runtime: GOMP_parallel, omp_get_thread_num, omp_get_num_threads (libgomp; LLVM's and
// Intel's export the same). Null pointers, the state at start: threads of our own.
void use_openmp_runtime(void* gomp_parallel, void* omp_get_thread_num, void* omp_get_num_threads);
// Whether work is split over one: never in a forked child.
bool has_openmp_runtime();

// Calls body(context, begin, end) on disjoint ranges that cover [0, count), on up to `threads` threads, and waits.
//
// The split is static: thread t of n has the range from count * t / n to count * (t + 1) / n. A caller's threads keep
// their numbers, so a thread sees the same rows at each call with the same count and threads, and what it was first to
// touch lies in the memory of its node as long as the system leaves it there (OMP_PROC_BIND=true makes sure).
//
// What body throws on any thread is thrown here after all have finished; of several, one. Within body, parallel_for
// runs on the calling thread.
void parallel_for(int64_t count, int threads, void (*body)(void* context, int64_t begin, int64_t end), void* context);

} // namespace bitpalette
