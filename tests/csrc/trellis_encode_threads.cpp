// csrc/cuda/trellis_encode.cuh as plain C++: every phase a loop over the threads of a block, in either order, so that
// one which reads what another writes in the same phase is found out.
//
// Compiled with CASES, a row of CASE(m, window, threads).
#include <math.h>

#include <memory>

#include "cuda/trellis_encode.cuh"

namespace {

template <class Search, int Threads>
struct Team {
    bool backwards;
    typename Search::Own own[Threads];

    template <class Phase>
    void each(const Phase& phase) {
        for (int k = 0; k < Threads; ++k) {
            const int thread = backwards ? Threads - 1 - k : k;
            phase(thread, own[thread]);
        }
    }
};

template <int M, int L, int Threads>
void encode(bool backwards, const float* x, long long tiles, unsigned char* codes, float* levels, unsigned char* left) {
    using Search = bitpalette::TileSearch<M, L, Threads>;
    const auto team = std::make_unique<Team<Search, Threads>>();
    const auto shared = std::make_unique<typename Search::Shared>();
    // what is there before must not matter
    const std::unique_ptr<unsigned short[]> row(new unsigned short[Search::shared_bytes / 2]);
    const std::unique_ptr<unsigned[]> scratch(new unsigned[Search::scratch_words]);
    team->backwards = backwards;
    for (long long k = 0; k < tiles; ++k)
        Search::encode(*team, *shared, row.get(), scratch.get(), x + k * 256, codes + k * 2 * M, levels + k * 256,
                       left + k);
}

} // namespace

// Whether the case was compiled.
extern "C" bool trellis_encode_threads(int m, int window, bool backwards, const float* x, long long tiles,
                                       unsigned char* codes, float* levels, unsigned char* left) {
#define CASE(M, L, Threads)                                                                                            \
    if (m == M && window == L)                                                                                         \
        return encode<M, L, Threads>(backwards, x, tiles, codes, levels, left), true;
    CASES
#undef CASE
    return false;
}
