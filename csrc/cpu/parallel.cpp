#include "parallel.h"

namespace bitpalette {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
using GetInt = int (*)();

GompParallel gomp_parallel = nullptr;
GetInt thread_number = nullptr;
GetInt thread_count = nullptr;

struct Region {
    int64_t count;
    void (*body)(void*, int64_t, int64_t);
    void* context;
};

void run_share(void* data) {
    const Region& region = *static_cast<const Region*>(data);
    // a runtime may give fewer threads than asked for (thread limits, nesting): split by what there is
    const int64_t thread = thread_number(), threads = thread_count();
    const int64_t begin = region.count * thread / threads;
    const int64_t end = region.count * (thread + 1) / threads;
    if (begin < end)
        region.body(region.context, begin, end);
}

} // namespace

void use_openmp_runtime(void* parallel, void* number, void* count) {
    const bool all = parallel != nullptr && number != nullptr && count != nullptr;
    gomp_parallel = all ? reinterpret_cast<GompParallel>(parallel) : nullptr;
    thread_number = all ? reinterpret_cast<GetInt>(number) : nullptr;
    thread_count = all ? reinterpret_cast<GetInt>(count) : nullptr;
}

bool has_openmp_runtime() {
    return gomp_parallel != nullptr;
}

void parallel_for(int64_t count, int threads, void (*body)(void*, int64_t, int64_t), void* context) {
    if (threads > count)
        threads = static_cast<int>(count);
    if (threads <= 1 || gomp_parallel == nullptr) {
        if (count > 0)
            body(context, 0, count);
        return;
    }
    Region region{count, body, context};
    gomp_parallel(run_share, &region, static_cast<unsigned>(threads), 0);
}

} // namespace bitpalette
