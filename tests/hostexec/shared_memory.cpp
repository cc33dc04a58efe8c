// The block's shared memory: poisoned with 0xff (NaN in every 16- and 32-bit format) when it starts and where a copy is
// under way, watched at its ends, its banks counted.
#include "core.h"

#include <algorithm>
#include <cstring>
#include <tuple>

namespace hostexec {

namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(HOSTEXEC_TSAN)
constexpr size_t margin = 0; // the sanitizer watches
#else
constexpr size_t margin = 1024;
#endif
constexpr uint8_t margin_byte = 0xa5, poison = 0xff;

struct Count {
    long accesses = 0, extra = 0;
};
// What all lanes of a warp read or write at a line, lane by lane.
struct Access {
    uint32_t lanes = 0;
    size_t bytes = 0;
    std::array<size_t, 32> offset;
};
enum class Kind { ldmatrix, lds, sts };
using Line = std::tuple<const char*, int, Kind>;
std::map<Line, Count> counts;
// of lds and sts, where lanes come one by one: also which warp and how many it did before
std::map<std::tuple<const Warp*, Line, long>, Access> open_accesses;

// 32 banks of 4 bytes. 8 bytes a lane go in two halves of a warp, 16 in four quarters, each a pass if it is free of
// conflicts: it takes as many as the bank with the most different words asked of it.
long extra_passes(const Access& access) {
    const int lanes = access.bytes <= 4 ? 32 : access.bytes == 8 ? 16 : 8;
    long extra = 0;
    for (int first = 0; first < 32; first += lanes) {
        std::array<size_t, 32> words; // asked for in this pass
        size_t count = 0;
        std::array<long, 32> bank{};
        for (int lane = first; lane < first + lanes; ++lane)
            if (access.lanes >> lane & 1)
                for (size_t at = access.offset[lane]; at < access.offset[lane] + access.bytes; at += 4)
                    if (std::find(words.begin(), words.begin() + count, at / 4) == words.begin() + count) {
                        words[count++] = at / 4;
                        ++bank[at / 4 % 32];
                    }
        extra += std::max(0l, *std::max_element(bank.begin(), bank.end()) - 1);
    }
    return extra;
}

void count(const Line& line, const Access& access) {
    Count& count = counts[line];
    ++count.accesses;
    count.extra += extra_passes(access);
}

} // namespace

uint8_t* allocate_shared(size_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, std::max<size_t>(1, bytes + 2 * margin)) != 0)
        return nullptr;
    uint8_t* const first = static_cast<uint8_t*>(memory);
    std::memset(first, margin_byte, margin);
    std::memset(first + margin, poison, bytes);
    std::memset(first + margin + bytes, margin_byte, margin);
    return first;
}
uint8_t* shared_of(uint8_t* memory) {
    return memory + margin;
}
bool shared_intact(const uint8_t* memory) {
    const auto right = [](uint8_t byte) { return byte == margin_byte; };
    const uint8_t* const end = memory + margin + machine.shared_bytes;
    return std::all_of(memory, memory + margin, right) && std::all_of(end, end + margin, right);
}
void free_shared(uint8_t* memory) {
    std::free(memory);
}

void check_shared(const void* address, size_t bytes, const char* what, Where where) {
    const auto first = reinterpret_cast<uintptr_t>(current.shared), at = reinterpret_cast<uintptr_t>(address);
    if (at < first || at + bytes > first + machine.shared_bytes)
        fail(where, "%s: shared memory out of range, offset %lld of %zu bytes", what,
             static_cast<long long>(at) - static_cast<long long>(first), machine.shared_bytes);
    if (at % bytes != 0)
        fail(where, "%s: misaligned, shared memory offset %zu is no multiple of %zu", what, at - first, bytes);
}

void async_copy16(void* shared, const void* global, bool valid, Where where) {
    Thread& me = *running;
    check_shared(shared, 16, "cp.async", where);
    if (valid && reinterpret_cast<uintptr_t>(global) % 16 != 0)
        fail(where, "cp.async: misaligned, global address %p is no multiple of 16", global);
    if (me.copy_count == Thread::most_copies)
        fail(where, "cp.async: more than %zu copies of one thread not waited for", Thread::most_copies);
    const bool now = options.copies == Copies::eager || (options.copies == Copies::mixed && next_random() & 1);
    Copy& copy = me.copies[(me.first_copy + me.copy_count++) % Thread::most_copies];
    copy = {shared, global, valid, !now, me.group, where};
#ifdef HOSTEXEC_TSAN
    __tsan_func_entry(__builtin_return_address(0));
    __tsan_write_range(shared, 16);
    if (valid)
        __tsan_read_range(const_cast<void*>(global), 16);
    __tsan_func_exit();
#endif
    if (!now)
        __builtin_memset(shared, poison, 16);
    else if (valid)
        __builtin_memcpy(shared, global, 16);
    else
        __builtin_memset(shared, 0, 16);
}

void async_commit() {
    ++running->group;
}

void async_wait(int groups) {
    Thread& me = *running;
    while (me.copy_count != 0 && me.copies[me.first_copy].group < me.group - groups) {
        const Copy& copy = me.copies[me.first_copy];
#ifdef HOSTEXEC_TSAN
        // it may have happened at any time between the two
        __tsan_func_entry(__builtin_return_address(0));
        __tsan_write_range(copy.shared, 16);
        if (copy.valid)
            __tsan_read_range(const_cast<void*>(copy.global), 16);
        __tsan_func_exit();
#endif
        if (copy.pending && copy.valid)
            __builtin_memcpy(copy.shared, copy.global, 16);
        else if (copy.pending)
            __builtin_memset(copy.shared, 0, 16);
        me.first_copy = (me.first_copy + 1) % Thread::most_copies;
        --me.copy_count;
    }
}

void ldmatrix_x4(void* out, const void* row, Where where) {
    check_shared(row, 16, "ldmatrix", where);
#ifdef HOSTEXEC_TSAN
    __tsan_func_entry(__builtin_return_address(0));
    __tsan_read_range(const_cast<void*>(row), 16);
    __tsan_func_exit();
#endif
    uint32_t in[5];
    __builtin_memcpy(in, row, 16); // here, not where the warp meets: a sanitizer names the right lane
    in[4] = static_cast<uint32_t>(static_cast<const uint8_t*>(row) - current.shared);
    collective(Op::ldmatrix_x4, in, 5, out, 4, where);
}

void shared_access(const void* address, size_t bytes, bool store, Where where) {
    check_shared(address, bytes, store ? "sts" : "lds", where);
#ifndef HOSTEXEC_TSAN // whose allocator must not be called from a fibre
    if (!options.conflicts)
        return;
    Thread& me = *running;
    auto mine = std::find_if(me.accesses.begin(), me.accesses.end(),
                             [&](const auto& entry) { return same_place(entry.first, where); });
    if (mine == me.accesses.end())
        mine = me.accesses.insert(me.accesses.end(), {where, 0});
    const Line line{where.file, where.line, store ? Kind::sts : Kind::lds};
    const auto key = std::make_tuple(me.warp, line, mine->second++);
    Access& access = open_accesses[key];
    access.lanes |= bit_of(me);
    access.bytes = bytes;
    access.offset[me.index % 32] = static_cast<size_t>(static_cast<const uint8_t*>(address) - current.shared);
    if (access.lanes == ~0u) {
        count(line, access);
        open_accesses.erase(key);
    }
#endif
}

void count_ldmatrix(const std::array<Warp::Slot, 32>& slots, Where where) {
#ifndef HOSTEXEC_TSAN
    Access access;
    access.lanes = ~0u;
    access.bytes = 16;
    for (int lane = 0; lane < 32; ++lane)
        access.offset[lane] = slots[lane].in[4];
    count({where.file, where.line, Kind::ldmatrix}, access);
#else
    (void)slots, (void)where;
#endif
}

void count_leftover() {
    for (const auto& [key, access] : open_accesses)
        count(std::get<1>(key), access);
    open_accesses.clear();
}
void forget_conflicts() {
    counts.clear();
    open_accesses.clear();
}
std::string conflicts_text() {
    static constexpr const char* kinds[] = {"ldmatrix", "lds", "sts"};
    std::string text;
    for (const auto& [line, count] : counts)
        text += std::string(base_name(std::get<0>(line))) + " " + std::to_string(std::get<1>(line)) + " " +
                kinds[static_cast<int>(std::get<2>(line))] + " " + std::to_string(count.accesses) + " " +
                std::to_string(count.extra) + "\n";
    return text;
}

} // namespace hostexec
