// The launch, its options and its errors.
#include "core.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <numeric>

namespace hostexec {

Options options;
Machine machine{};
Current current{};
Thread* running = nullptr;

namespace {

constexpr int launch_failure = 719, invalid_configuration = 9, out_of_memory = 2; // cudaError_t
constexpr size_t most_shared = 227 * 1024; // of a block on sm_90; sm_80 has 163 KiB, sm_86 and sm_89 99
constexpr unsigned most_threads = 1024;
uint64_t random_state = 0;

void say_list(const char* format, va_list arguments) {
    const size_t used = std::strlen(machine.message);
    std::vsnprintf(machine.message + used, sizeof machine.message - used, format, arguments);
}

} // namespace

void say(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    say_list(format, arguments);
    va_end(arguments);
}

void fail(Where where, const char* text, ...) {
    machine.message[0] = 0;
    say("%s:%d: block %u thread %u: ", base_name(where.file), where.line, running->block->index, running->index);
    va_list arguments;
    va_start(arguments, text);
    say_list(text, arguments);
    va_end(arguments);
    machine.failed = true;
    running->fibre.switch_to(machine.scheduler, true);
    std::abort(); // never resumed
}

const char* base_name(const char* path) {
    const char* const slash = std::strrchr(path, '/');
    return slash == nullptr ? path : slash + 1;
}

bool same_place(Where a, Where b) {
    return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

void seed_random(uint64_t seed) {
    random_state = seed;
}

uint64_t next_random() { // splitmix64, Steele, Lea and Flood 2014
    uint64_t z = random_state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

int launch(const std::function<void()>& kernel, unsigned grid, unsigned block, size_t bytes) {
    machine.message[0] = 0;
    machine.failed = false;
    if (grid == 0 || block == 0 || block > most_threads || bytes > most_shared) {
        std::snprintf(
            machine.message, sizeof machine.message,
            "invalid configuration: %u blocks of %u threads with %zu bytes of shared memory (1 to %u threads, "
            "at most %zu bytes)",
            grid, block, bytes, most_threads, most_shared);
        return invalid_configuration;
    }
#ifdef HOSTEXEC_TSAN
    // a fibre takes it close to a megabyte, and none is used twice
    if (static_cast<uint64_t>(grid) * block > 4096) {
        std::snprintf(machine.message, sizeof machine.message,
                      "ThreadSanitizer has room for 4096 threads, not %u blocks of %u: use a smaller shape", grid,
                      block);
        return out_of_memory;
    }
#endif
    if (block != machine.block_threads)
        forget_blocks();
    machine.body = &kernel;
    machine.grid_blocks = grid;
    machine.block_threads = block;
    machine.shared_bytes = bytes;
    seed_random(options.seed);
    std::vector<unsigned> order(grid); // hardware promises none
    std::iota(order.begin(), order.end(), 0u);
    if (options.schedule == Schedule::reverse || options.schedule == Schedule::greedy_high)
        std::reverse(order.begin(), order.end());
    if (options.schedule == Schedule::random)
        for (size_t i = grid - 1; i > 0; --i)
            std::swap(order[i], order[next_random() % (i + 1)]);
    run_blocks(order);
    running = nullptr;
    return machine.failed ? launch_failure : 0;
}

int resident_blocks() {
    return options.coresident;
}

const char* error() {
    return machine.message;
}

} // namespace hostexec

extern "C" {

void hostexec_configure(int schedule, unsigned long long seed, int copies, int coresident, int conflicts) {
    hostexec::options = {static_cast<hostexec::Schedule>(schedule), seed, static_cast<hostexec::Copies>(copies),
                         coresident, conflicts != 0};
    hostexec::forget_conflicts();
    hostexec::machine.message[0] = 0;
}

// Of the last launch; empty if all went well.
const char* hostexec_error() {
    return hostexec::error();
}

// Lines "file line which accesses extra" since the options were set. How many bytes; at most size - 1 are written.
int hostexec_conflicts(char* out, int size) {
    const std::string text = hostexec::conflicts_text();
    std::snprintf(out, static_cast<size_t>(size), "%s", text.c_str());
    return static_cast<int>(text.size());
}
}
