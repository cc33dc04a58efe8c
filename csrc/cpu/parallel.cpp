#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define BITPALETTE_FORKS 1
#endif

#include "thread_pool.h"

namespace bitpalette {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
using GetInt = int (*)();

std::atomic<GompParallel> gomp_parallel{nullptr}; // written last and read first: those below are there with it
std::atomic<GetInt> thread_number{nullptr};
std::atomic<GetInt> thread_count{nullptr};

std::atomic<ThreadPool*> own_pool{nullptr}; // made when it is first needed; its threads outlive every destructor
std::atomic<bool> taken{false};             // a caller has the pool, whichever it is
std::atomic<bool> forked{false};            // this process is a child: the parent's threads are not here

#ifdef BITPALETTE_FORKS
// Runs in the child, where only the thread that forked exists. The old pool stays where it is: threads that are not
// here may have been in the middle of it.
void after_fork() {
    forked.store(true);
    gomp_parallel.store(nullptr);
    own_pool.store(nullptr);
    taken.store(false);
}

[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, after_fork);
#endif

struct Region {
    int64_t count;
    void (*body)(void*, int64_t, int64_t);
    void* context;
    std::atomic<bool> failed{false};
    std::exception_ptr error; // of the first that failed

    Region(int64_t count, void (*body)(void*, int64_t, int64_t), void* context)
        : count(count), body(body), context(context) {}

    void share(int64_t thread, int64_t threads) {
        const int64_t begin = count * thread / threads, end = count * (thread + 1) / threads;
        if (begin >= end)
            return;
        try { // an exception that leaves a thread ends the process
            body(context, begin, end);
        } catch (...) {
            if (!failed.exchange(true))
                error = std::current_exception();
        }
    }
};

// The pool, for as long as this lives, if nobody else has it.
class Turn {
  public:
    Turn() : mine(!taken.exchange(true)) {}
    ~Turn() {
        if (mine)
            taken.store(false);
    }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

    const bool mine;
};

// Called by who has the turn.
ThreadPool& threads_of_our_own() {
    ThreadPool* pool = own_pool.load();
    if (pool == nullptr)
        own_pool.store(pool = new ThreadPool);
    return *pool;
}

} // namespace

void use_openmp_runtime(void* parallel, void* number, void* count) {
    const bool all = parallel != nullptr && number != nullptr && count != nullptr;
    if (!all || forked.load()) {
        gomp_parallel.store(nullptr);
        return;
    }
    thread_number.store(reinterpret_cast<GetInt>(number));
    thread_count.store(reinterpret_cast<GetInt>(count));
    gomp_parallel.store(reinterpret_cast<GompParallel>(parallel));
}

bool has_openmp_runtime() {
    return gomp_parallel.load() != nullptr;
}

void parallel_for(int64_t count, int threads, void (*body)(void*, int64_t, int64_t), void* context) {
    if (count <= 0)
        return;
    threads = static_cast<int>(std::min<int64_t>(threads, count));
    if (threads <= 1)
        return body(context, 0, count);
    Region region(count, body, context);
    {
        const Turn turn;
        if (!turn.mine)
            return body(context, 0, count);
        if (const GompParallel parallel = gomp_parallel.load()) {
            // a runtime may give fewer threads than asked for (thread limits, nesting): split by what there is
            const auto share = [](void* data) {
                static_cast<Region*>(data)->share(thread_number.load()(), thread_count.load()());
            };
            parallel(share, &region, static_cast<unsigned>(threads), 0);
        } else {
            const auto share = [](void* data, int thread, int n) { static_cast<Region*>(data)->share(thread, n); };
            threads_of_our_own().run(threads, share, &region);
        }
    }
    if (region.error)
        std::rethrow_exception(region.error);
}

} // namespace bitpalette
