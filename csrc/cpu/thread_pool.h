// Threads of our own, for where there is no OpenMP runtime to share with torch: see parallel.h.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace bitpalette {

// Threads that wait for work: for a while by looking again and again, then asleep. They live as long as the process
// and are never joined, so a pool must never be destroyed.
class ThreadPool {
  public:
    using Share = void (*)(void* context, int thread, int threads);

    // Calls share(context, thread, threads) for thread = 0..threads-1, 0 on the calling thread, and waits for all. A
    // number of the same thread from call to call. Fewer than `threads` where the system gives no more. One caller at a
    // time; share must not throw.
    void run(int threads, Share share, void* context);

  private:
    struct Job {
        Share share;
        void* context;
        int threads;
    };
    // On a line of its own: its thread looks at it all the time.
    struct alignas(64) Worker {
        int thread = 0;
        std::atomic<const Job*> job{nullptr};
        std::atomic<bool> asleep{false};
        std::mutex mutex;
        std::condition_variable wake;
    };

    int start_up_to(int threads);
    void work(Worker& worker);

    std::vector<std::unique_ptr<Worker>> workers_; // of threads 1, 2, ...
    alignas(64) std::atomic<int> running_{0};      // workers that have not finished
    std::atomic<bool> caller_asleep_{false};
    std::mutex mutex_;
    std::condition_variable finished_;
};

} // namespace bitpalette
