#include "thread_pool.h"

#include <chrono>
#include <system_error>
#include <thread>

namespace bitpalette {
namespace {

// How long a thread looks for work before it sleeps, microseconds: longer than from a model's layer to the next, since
// waking costs more than a layer does (8 us became 116, calls 100 us apart), and not long, since the core may be
// wanted.
constexpr int64_t look_microseconds = 100;
constexpr int looks_per_clock = 32; // reading the clock costs more than looking

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

// Whether `ready` came true while looking.
template <class Ready>
bool look(const Ready& ready) {
    using Clock = std::chrono::steady_clock;
    const auto end = Clock::now() + std::chrono::microseconds(look_microseconds);
    do {
        for (int i = 0; i < looks_per_clock; ++i) {
            if (ready())
                return true;
            pause();
        }
    } while (Clock::now() < end);
    return ready();
}

// Who sleeps says so first and then looks once more; who wakes changes what is looked at and then asks whether one
// sleeps. Both in one order for all threads (seq_cst): one of the two sees the other.
template <class Ready>
void sleep_until(std::mutex& mutex, std::condition_variable& wake, std::atomic<bool>& asleep, const Ready& ready) {
    std::unique_lock<std::mutex> lock(mutex);
    asleep.store(true);
    wake.wait(lock, ready);
    asleep.store(false);
}

void wake_up(std::mutex& mutex, std::condition_variable& wake, const std::atomic<bool>& asleep) {
    if (!asleep.load())
        return;
    const std::lock_guard<std::mutex> lock(mutex); // between its last look and its sleep, it holds this
    wake.notify_one();
}

} // namespace

void ThreadPool::run(int threads, Share share, void* context) {
    const Job job{share, context, start_up_to(threads)};
    running_.store(job.threads - 1);
    for (int t = 1; t < job.threads; ++t) {
        Worker& worker = *workers_[static_cast<size_t>(t - 1)];
        worker.job.store(&job);
        wake_up(worker.mutex, worker.wake, worker.asleep);
    }
    share(context, 0, job.threads);
    const auto done = [this] { return running_.load() == 0; };
    if (!look(done))
        sleep_until(mutex_, finished_, caller_asleep_, done);
}

// How many threads there are then, the caller among them.
int ThreadPool::start_up_to(int threads) {
    while (static_cast<int>(workers_.size()) < threads - 1) {
        workers_.push_back(std::make_unique<Worker>());
        Worker& worker = *workers_.back();
        worker.thread = static_cast<int>(workers_.size());
        try {
            std::thread([this, &worker] { work(worker); }).detach();
        } catch (const std::system_error&) { // the limit of threads of this user or container
            workers_.pop_back();
            return static_cast<int>(workers_.size()) + 1;
        }
    }
    return threads;
}

void ThreadPool::work(Worker& worker) {
    const auto ready = [&worker] { return worker.job.load() != nullptr; };
    for (;;) {
        if (!look(ready))
            sleep_until(worker.mutex, worker.wake, worker.asleep, ready);
        const Job& job = *worker.job.load();
        job.share(job.context, worker.thread, job.threads);
        worker.job.store(nullptr);
        // the caller may return as soon as this is zero: nothing of its job is touched from here on
        if (running_.fetch_sub(1) == 1)
            wake_up(mutex_, finished_, caller_asleep_);
    }
}

} // namespace bitpalette
