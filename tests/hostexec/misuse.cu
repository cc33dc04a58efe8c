// Kernels that are wrong, each in one way, for test_errors.py: the executor must say which and on which line. A line
// that it must name has a comment `here: NAME`.
#include "launch.cuh"

namespace bitpalette {

using namespace ptx;

template <int Unused>
BP_GLOBAL void divergent_lines(uint32_t* out) {
    uint32_t value = lane();
    if (lane() < 16)
        value = shfl(value, 0); // here: divergent_lines
    else
        value = shfl(value, 1);
    out[thread()] = value;
}
template <int Unused>
BP_GLOBAL void divergent_ops(uint32_t* out) {
    uint32_t value = lane();
    if (lane() % 2 == 0)
        value = shfl(value, 0);
    else
        value = redux_max(value); // here: divergent_ops
    out[thread()] = value;
}
template <int Unused>
BP_GLOBAL void missing_lanes(uint32_t* out) {
    uint32_t value = lane();
    if (lane() < 16)
        value = shfl(value, 0); // here: missing_lanes
    out[thread()] = value;
}
template <int Unused>
BP_GLOBAL void exited_lane(uint32_t* out) {
    if (lane() == 3)
        return;
    out[thread()] = ballot(true); // here: exited_lane
}
template <int Unused>
BP_GLOBAL void divergent_barrier(uint32_t* out) {
    if (warp() == 0)
        sync_threads(); // here: divergent_barrier
    else
        sync_threads();
    out[thread()] = 0;
}
template <int Unused>
BP_GLOBAL void exit_before_barrier(uint32_t* out) {
    if (thread() == 40)
        return;
    sync_threads(); // here: exit_before_barrier
    out[thread()] = 0;
}
template <int Unused>
BP_GLOBAL void lost_arrival(uint32_t* out) {
    if (warp() == 0)
        named_sync(3, 64); // here: lost_arrival
    out[thread()] = 0;
}
template <int Unused>
BP_GLOBAL void named_counts(uint32_t* out) {
    if (warp() == 0)
        named_sync(3, 64);
    else
        named_sync(3, 96); // here: named_counts
    out[thread()] = 0;
}
template <int Unused>
BP_GLOBAL void named_zero(uint32_t* out) {
    named_sync(0, 64); // here: named_zero
    out[thread()] = 0;
}
template <int Unused>
BP_GLOBAL void named_part_of_warp(uint32_t* out) {
    named_arrive(1, 48); // here: named_part_of_warp
    out[thread()] = 0;
}
template <int Unused>
BP_GLOBAL void leftover_copy(uint32_t* out) {
    BP_DYNAMIC_SHARED(shared);
    cp_async16(shared + 16 * lane(), out, true); // here: leftover_copy
    cp_async_commit();
    cp_async_wait<1>();
}
template <int Unused>
BP_GLOBAL void uncommitted_copy(uint32_t* out) {
    BP_DYNAMIC_SHARED(shared);
    cp_async16(shared + 16 * lane(), out, true); // here: uncommitted_copy
    cp_async_wait<0>();
}
template <int Unused>
BP_GLOBAL void misaligned_copy_shared(uint32_t* out) {
    BP_DYNAMIC_SHARED(shared);
    cp_async16(shared + 16 * lane() + 8, out, true); // here: misaligned_copy_shared
}
template <int Unused>
BP_GLOBAL void misaligned_copy_global(uint32_t* out) {
    BP_DYNAMIC_SHARED(shared);
    cp_async16(shared + 16 * lane(), out + 1, true); // here: misaligned_copy_global
}
template <int Unused>
BP_GLOBAL void copy_out_of_range(uint32_t* out) {
    BP_DYNAMIC_SHARED(shared);
    cp_async16(shared + 1024 - 16 + 16 * lane(), out, true); // here: copy_out_of_range
    cp_async_commit();
    cp_async_wait<0>();
}
template <int Unused>
BP_GLOBAL void misaligned_ldmatrix(uint32_t* out) {
    BP_DYNAMIC_SHARED(shared);
    uint32_t r[4];
    ldmatrix_x4(r, shared + 8 * lane()); // here: misaligned_ldmatrix
    out[thread()] = r[0];
}
template <int Unused>
BP_GLOBAL void ldmatrix_out_of_range(uint32_t* out) {
    BP_DYNAMIC_SHARED(shared);
    uint32_t r[4];
    ldmatrix_x4(r, shared - 16 + 16 * lane()); // here: ldmatrix_out_of_range
    out[thread()] = r[0];
}
template <int Unused>
BP_GLOBAL void misaligned_lds(uint32_t* out) {
    BP_DYNAMIC_SHARED(shared);
    out[thread()] = lds(reinterpret_cast<const uint4*>(shared + 8 * lane())).x; // here: misaligned_lds
}
template <int Unused>
BP_GLOBAL void sts_out_of_range(uint32_t* out) {
    BP_DYNAMIC_SHARED(shared);
    sts(reinterpret_cast<uint32_t*>(shared) + 250 + lane(), out[0]); // here: sts_out_of_range
}
template <int Unused>
BP_GLOBAL void store_out_of_range(uint32_t*) {
    BP_DYNAMIC_SHARED(shared);
    shared[1024 + thread()] = 1; // here: store_out_of_range
}
template <int Unused>
BP_GLOBAL void misaligned_load(uint32_t* out) {
    BP_DYNAMIC_SHARED(shared);
    sync_threads();
    out[thread()] = reinterpret_cast<const uint4*>(shared + 8 * lane())->x; // here: misaligned_load
}
template <int Unused>
BP_GLOBAL void spin_for_nothing(uint32_t* out) {
    while (ld_acquire(out) != 1234567u) { // here: spin_for_nothing
    }
}
template <int Unused>
BP_GLOBAL void block_waits_for_later(uint32_t* out) {
    if (block() == 0)
        while (ld_acquire(out) != 1u) { // here: block_waits_for_later
        }
    else
        st_release(out, 1u);
}
template <int Unused>
BP_GLOBAL void shared_race(uint32_t* out) {
    BP_DYNAMIC_SHARED(shared);
    uint32_t* const words = reinterpret_cast<uint32_t*>(shared);
    words[thread()] = thread();
    out[thread()] = words[thread() ^ 32]; // here: shared_race
}
// shfl orders no memory: right on many a GPU by luck
template <int Unused>
BP_GLOBAL void missing_sync_warp(uint32_t* out) {
    BP_DYNAMIC_SHARED(shared);
    uint32_t* const words = reinterpret_cast<uint32_t*>(shared);
    words[thread()] = thread();
    const uint32_t other = shfl(thread(), 5);
#ifdef WITH_SYNC_WARP
    sync_warp();
#endif
    out[thread()] = words[thread() ^ 1] + other; // here: missing_sync_warp
}
template <int Unused>
BP_GLOBAL void global_race(uint32_t* out) {
    out[0] = block(); // here: global_race
}

} // namespace bitpalette

using namespace bitpalette;

#define BP_MISUSE(name, blocks)                                                                                        \
    extern "C" int run_##name(uint32_t* out) {                                                                         \
        return launch(name<0>, blocks, 64, 1024, nullptr, out);                                                        \
    }

BP_MISUSE(divergent_lines, 1)
BP_MISUSE(divergent_ops, 1)
BP_MISUSE(missing_lanes, 1)
BP_MISUSE(exited_lane, 1)
BP_MISUSE(divergent_barrier, 1)
BP_MISUSE(exit_before_barrier, 1)
BP_MISUSE(lost_arrival, 1)
BP_MISUSE(named_zero, 1)
BP_MISUSE(named_part_of_warp, 1)
BP_MISUSE(leftover_copy, 1)
BP_MISUSE(uncommitted_copy, 1)
BP_MISUSE(misaligned_copy_shared, 1)
BP_MISUSE(misaligned_copy_global, 1)
BP_MISUSE(copy_out_of_range, 1)
BP_MISUSE(misaligned_ldmatrix, 1)
BP_MISUSE(ldmatrix_out_of_range, 1)
BP_MISUSE(misaligned_lds, 1)
BP_MISUSE(sts_out_of_range, 1)
BP_MISUSE(store_out_of_range, 1)
BP_MISUSE(misaligned_load, 1)
BP_MISUSE(spin_for_nothing, 1)
BP_MISUSE(block_waits_for_later, 2)
BP_MISUSE(shared_race, 1)
BP_MISUSE(missing_sync_warp, 1)
BP_MISUSE(global_race, 2)

extern "C" int run_named_counts(uint32_t* out) {
    return launch(named_counts<0>, 1, 96, 1024, nullptr, out);
}
extern "C" int run_configuration(int grid, int block, int bytes) {
    return launch(shared_race<0>, static_cast<unsigned>(grid), static_cast<unsigned>(block), static_cast<size_t>(bytes),
                  nullptr, nullptr);
}
