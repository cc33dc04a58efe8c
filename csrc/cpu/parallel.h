// Splitting work over the threads of the OpenMP runtime that torch has already loaded: one pool, never two that fight.
#pragma once

#include <cstdint>

namespace bitpalette {

// Entry points of a loaded OpenMP runtime: GOMP_parallel, omp_get_thread_num, omp_get_num_threads (libgomp; LLVM's and
// Intel's export the same). A null pointer, the state at start, means that all work runs on the calling thread.
void use_openmp_runtime(void* gomp_parallel, void* omp_get_thread_num, void* omp_get_num_threads);
bool has_openmp_runtime();

// Calls body(context, begin, end) on disjoint ranges that cover [0, count), on up to `threads` threads, and waits.
// The split is static: a range a thread. `body` must not throw.
void parallel_for(int64_t count, int threads, void (*body)(void* context, int64_t begin, int64_t end), void* context);

} // namespace bitpalette
