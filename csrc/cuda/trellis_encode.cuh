// The search of csrc/cpu/trellis_search.cpp, one block of threads for a tile, with the same result bit for bit.
//
// The arithmetic is that of csrc/cpu/trellis_step.h. What differs is where things are kept. The row of costs, at most
// 64 KiB, stays in shared memory for all steps and is replaced in place: a step reads it in one phase, holding what it
// finds in registers, and writes it in the next. Of a step only its decisions are stored: 4 KiB at L = 16, where the
// rows themselves would be up to 64.
//
// A block is a sequence of phases with a barrier behind each (`Team::each`); between two barriers no thread reads what
// another writes. So the same source, each phase a loop over the threads, is plain C++ too, as the tests compile it.
// It is compiled at run time, where there are no standard headers: it includes nothing.
#pragma once

#ifdef __CUDACC__
#define TRELLIS_CONSTANT __host__ __device__ constexpr
#define TRELLIS_DEVICE __device__ __forceinline__
#else
#define TRELLIS_CONSTANT constexpr
#define TRELLIS_DEVICE inline
#endif

namespace bitpalette {

// The sum of the four bytes: one instruction on a GPU.
TRELLIS_DEVICE int byte_sum(unsigned word) {
#ifdef __CUDA_ARCH__
    return static_cast<int>(__dp4a(word, 0x01010101u, 0u));
#else
    return static_cast<int>((word & 0xff) + (word >> 8 & 0xff) + (word >> 16 & 0xff) + (word >> 24));
#endif
}

// The same value, of which the compiler does not know that it is the same in every step. Else it keeps dozens of sums
// and products of the thread's number in registers throughout, more than there are, to save one instruction each.
TRELLIS_DEVICE int anew(int value) {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+r"(value));
#endif
    return value;
}

// Lowers *where to the least value that the threads of a phase bring. All threads of a warp call it together: one
// atomic operation for 32 of them.
TRELLIS_DEVICE void lower(unsigned* where, unsigned value) {
#ifdef __CUDA_ARCH__
    const unsigned least = __reduce_min_sync(0xffffffffu, value);
    if (threadIdx.x % 32 == 0)
        atomicMin(where, least);
#else
    *where = value < *where ? value : *where;
#endif
}

// Bits that say which of 2^fold states won: a power of two, so that none lies across two words.
TRELLIS_CONSTANT int trellis_field(int fold) {
    return fold < 3 ? fold : fold < 5 ? 4 : 8;
}

// Pairs of costs of the row behind a fold, by thread. Two that lie side by side go together: both come from one cost of
// the row before.
TRELLIS_CONSTANT int trellis_pairs(int window, int threads, int fold) {
    return (1 << (window - 1 - fold)) / threads;
}

// Words of the decisions of one thread in a step.
TRELLIS_CONSTANT int trellis_words(int window, int threads, int fold) {
    return (2 * trellis_pairs(window, threads, fold) * trellis_field(fold) + 31) / 32;
}

// M bits for every 16 weights, windows of L bits, Threads (a power of two) to a tile.
template <int M, int L, int Threads>
struct TileSearch {
    static constexpr int weights = 256, normalize_every = 8, row_most = 32767;
    // window * (1/2 + 72 / M) steps before the seam, in whole eighths
    static constexpr int lead_eighths = (2 * L * (M + 144) + 16 * M) / (32 * M);
    static constexpr int lead = normalize_every * (lead_eighths > 2 ? lead_eighths : 2);
    static constexpr int steps = lead + weights, seam = lead - 1, last = steps - 1;
    static constexpr int fixed_point = M < 32 ? 16 : M < 52 ? 32 : 64; // of a level
    static constexpr int centre = 510;                                 // of levels, which are byte sums
    static constexpr unsigned multiplier = 0x83DCD12Du;
    static constexpr int few = M / 16, many = (M + 15) / 16; // bits of a step: one of the two

    static constexpr int most_pairs = trellis_pairs(L, Threads, few);
    static_assert(most_pairs <= 16, "more threads: the pairs of one are held in registers");
    static_assert(trellis_pairs(L, Threads, many) >= 1 && Threads % 32 == 0, "fewer threads, in whole warps");

    static constexpr int row_size = 1 << (L - few);
    static constexpr int shared_bytes = 2 * row_size; // of dynamic shared memory, for the row

    static constexpr int step_words = Threads > 1 << (L - 6) ? Threads : 1 << (L - 6);
    static_assert(trellis_words(L, Threads, few) * Threads <= step_words, "room for the decisions of a step");
    static_assert(trellis_words(L, Threads, many) * Threads <= step_words, "room for the decisions of a step");
    static constexpr int decision_words = (weights + 1) * step_words;   // from the seam on
    static constexpr int scratch_words = decision_words + row_size / 2; // and the row behind the seam, in pairs

    struct Own { // a thread's registers from one phase to the next
        unsigned pair[most_pairs];
    };

    struct Shared {
        short x[weights]; // in fixed point
        unsigned least[steps / normalize_every];
        unsigned end; // cheapest cost of all << 16 | where in the last row
        int outcome;
        int apart;                        // whether neighbours' states do not join
        unsigned short path[weights + 1]; // states of the steps from the seam on
    };

    static TRELLIS_DEVICE int offset(int i) { return i * M / 16; }
    static TRELLIS_DEVICE int bits(int i) { return offset(i + 1) - offset(i); }
    static TRELLIS_DEVICE int weight(int step) { return (lead - 1 - step) & 255; }
    static TRELLIS_DEVICE int expand(int step) { return bits(weight(step)); }
    static TRELLIS_DEVICE int fold(int step) { return bits((weight(step) - 1) & 255); }

    // The metric of a state is ((x - level)^2 + 2^14) >> 15, the difference clamped to 16 bits. Only sixty-fourths need
    // the clamp. A difference and its negative have the same square, so it is taken with the sign of x: then only its
    // upper bound can be met.
    struct Metric {
        int base, slope, most;

        TRELLIS_DEVICE explicit Metric(int x) {
            const bool negative = fixed_point == 64 && x < 0;
            slope = negative ? fixed_point : -fixed_point;
            base = (negative ? -x : x) - slope * centre;
            most = negative ? 32768 : 32767;
        }
        TRELLIS_DEVICE unsigned operator()(unsigned product) const { // state * multiplier
            int d = base + slope * byte_sum(product);
            if (fixed_point == 64)
                d = d < most ? d : most;
            return static_cast<unsigned>(d * d + (1 << 14)) >> 15;
        }
    };

    // Phase 1 of a step: the next row and its decisions from the row that there is.
    template <int Fold>
    static TRELLIS_DEVICE void search(int thread, Own& own, Shared& shared, const unsigned short* row, int step,
                                      unsigned* decisions) {
        constexpr int width = trellis_field(Fold), count = trellis_pairs(L, Threads, Fold);
        const int shift = expand(step);
        const Metric metric(shared.x[weight(step)]);
        unsigned least = row_most, word = 0;
        thread = anew(thread);
#pragma unroll
        for (int p = 0; p < count; ++p) {
            const unsigned t = 2 * static_cast<unsigned>(p * Threads + thread);
            // cost << 5 | number of the state: the least of these is the cheapest state, of equals the first
            unsigned even = 0xffffffffu, odd = 0xffffffffu;
#pragma unroll(Fold < 3 ? 1 << Fold : 4)
            for (unsigned h = 0; h < 1u << Fold; ++h) {
                const unsigned state = h << (L - Fold) | t, product = state * multiplier;
                const unsigned from = static_cast<unsigned>(row[state >> shift]) << 5 | h;
                const unsigned a = from + (metric(product) << 5), b = from + (metric(product + multiplier) << 5);
                even = a < even ? a : even;
                odd = b < odd ? b : odd;
            }
            word |= ((even & 31) | (odd & 31) << width) << (2 * p * width % 32);
            if ((p + 1) * 2 * width % 32 == 0 || p + 1 == count) {
                if (step >= seam)
                    decisions[(step - seam) * step_words + 2 * p * width / 32 * Threads + thread] = word;
                word = 0;
            }
            even = even >> 5 < row_most ? even >> 5 : row_most;
            odd = odd >> 5 < row_most ? odd >> 5 : row_most;
            least = even < least ? even : least;
            least = odd < least ? odd : least;
            own.pair[p] = even | odd << 16;
        }
        if (step % normalize_every == normalize_every - 1)
            lower(&shared.least[step / normalize_every], least);
    }

    // Phase 2 of a step: the row in the place of the one before, less its least value at times.
    template <int Fold>
    static TRELLIS_DEVICE void store(int thread, const Own& own, const Shared& shared, unsigned short* row, int step,
                                     unsigned* kept_row) {
        const bool normalize = step % normalize_every == normalize_every - 1;
        const unsigned least = normalize ? shared.least[step / normalize_every] * 0x10001u : 0u;
        thread = anew(thread);
#pragma unroll
        for (int p = 0; p < trellis_pairs(L, Threads, Fold); ++p) {
            const int j = p * Threads + thread;
            const unsigned pair = own.pair[p] - least;
            row[2 * j] = static_cast<unsigned short>(pair);
            row[2 * j + 1] = static_cast<unsigned short>(pair >> 16);
            if (step == seam)
                kept_row[j] = pair;
        }
    }

    // The state of a step from the low bits that the next one keeps of it.
    static TRELLIS_DEVICE unsigned state_before(const unsigned* decisions, int step, unsigned kept) {
        const int f = fold(step), width = trellis_field(f), j = static_cast<int>(kept >> 1);
        const int bit = (2 * (j / Threads) + static_cast<int>(kept & 1)) * width;
        const unsigned word = decisions[(step - seam) * step_words + bit / 32 * Threads + j % Threads];
        return (word >> (bit % 32) & ((1u << f) - 1)) << (L - f) | kept;
    }

    enum Outcome { found, clipped, not_cyclic };

    // The state at the seam of the best path that ends in `state`, whose states are written from the end back, where
    // `join` until it falls in with the path that is already there.
    static TRELLIS_DEVICE unsigned trace(Shared& shared, const unsigned* decisions, unsigned state, bool join) {
        for (int step = last; step > seam; --step) {
            unsigned short& there = shared.path[step - seam];
            if (join && step < last && there == state)
                return shared.path[0];
            there = static_cast<unsigned short>(state);
            state = state_before(decisions, step - 1, state >> expand(step));
        }
        return state;
    }

    // Whether a cost up to step `end` of the path was clipped in its row. Rows are gone: the costs are added up again,
    // from the path's in the row behind the seam on. Up to the first one that was clipped they are the rows'.
    static TRELLIS_DEVICE bool is_clipped(const Shared& shared, unsigned cost, int end) {
        for (int step = lead; step < end; ++step) {
            cost += Metric(shared.x[weight(step)])(shared.path[step - seam] * multiplier);
            if (cost > row_most)
                return true;
            if ((step + 1) % normalize_every == 0)
                cost -= shared.least[step / normalize_every];
        }
        return false;
    }

    static TRELLIS_DEVICE bool is_clipped_from_seam(const Shared& shared, const unsigned* kept_row, int end) {
        const unsigned first = static_cast<unsigned>(shared.path[1]) >> expand(lead);
        const unsigned cost = kept_row[first >> 1] >> (first & 1) * 16 & 0xffff;
        // the seam's own: one that equals the bound counts too, which at worst leaves a tile to the CPU
        return cost + shared.least[seam / normalize_every] >= row_most || is_clipped(shared, cost, end);
    }

    // One thread's, behind the first pass: the best path of all fixes the seam's state, and the best that ends in it is
    // cyclic if it joins that one.
    static TRELLIS_DEVICE Outcome close(Shared& shared, const unsigned* decisions, const unsigned* kept_row) {
        const unsigned end = state_before(decisions, last, shared.end & 0xffff);
        const unsigned state = trace(shared, decisions, end, false);
        shared.path[0] = static_cast<unsigned short>(state);
        if (is_clipped_from_seam(shared, kept_row, steps))
            return clipped;
        const unsigned crossing = trace(shared, decisions, state, true);
        if (is_clipped_from_seam(shared, kept_row, last))
            return clipped;
        return crossing == state ? found : not_cyclic;
    }

    // One thread's, behind the second pass, which began in the seam's state.
    static TRELLIS_DEVICE Outcome close_from_seam(Shared& shared, const unsigned* decisions) {
        unsigned now = shared.path[0];
        for (int step = last; step > lead; --step) {
            shared.path[step - seam] = static_cast<unsigned short>(now);
            now = state_before(decisions, step - 1, now >> expand(step));
        }
        shared.path[lead - seam] = static_cast<unsigned short>(now);
        return now >> expand(lead) != kept_by_lead(shared.path[0]) || is_clipped(shared, 0, last) ? clipped : found;
    }

    static TRELLIS_DEVICE unsigned kept_by_lead(unsigned state) { return state & ((1u << (L - fold(seam))) - 1); }

    static TRELLIS_DEVICE unsigned state(const Shared& shared, int i) { return shared.path[weights - i]; }

    // Byte b of the tile: bit j is the last weight's that begins at or before it.
    static TRELLIS_DEVICE unsigned char packed(const Shared& shared, int b) {
        unsigned byte = 0;
        for (int j = 8 * b; j < 8 * b + 8; ++j) {
            const int i = (16 * j + 15) / M;
            byte |= (state(shared, i) >> (j - offset(i)) & 1) << (j - 8 * b);
        }
        return static_cast<unsigned char>(byte);
    }

    static TRELLIS_DEVICE bool joins(const Shared& shared, int i) {
        return state(shared, i) >> bits(i) == (state(shared, (i + 1) & 255) & ((1u << (L - bits(i))) - 1));
    }

    static TRELLIS_DEVICE short fixed(float x) {
        const float most = 512 * fixed_point - 1, scaled = x * fixed_point;
        return static_cast<short>(rintf(scaled > most ? most : scaled < -most ? -most : scaled));
    }

    template <class Team>
    static TRELLIS_DEVICE void pass(Team& team, Shared& shared, unsigned short* row, unsigned* scratch, int first) {
#pragma unroll 1
        for (int step = first; step < steps; ++step) {
            const bool is_few = fold(step) == few;
            team.each([&](int thread, Own& own) {
                if (is_few)
                    search<few>(thread, own, shared, row, step, scratch);
                else
                    search<many>(thread, own, shared, row, step, scratch);
            });
            team.each([&](int thread, Own& own) {
                if (is_few)
                    store<few>(thread, own, shared, row, step, scratch + decision_words);
                else
                    store<many>(thread, own, shared, row, step, scratch + decision_words);
            });
        }
    }

    // x [256] in levels, finite; codes [2 M] and levels [256] out. *left: 1 where costs do not fit 16 bits, for which
    // the CPU has another search; else 0. row [row_size], shared and scratch [scratch_words] are the block's own.
    template <class Team>
    static TRELLIS_DEVICE void encode(Team& team, Shared& shared, unsigned short* row, unsigned* scratch,
                                      const float* x, unsigned char* codes, float* levels, unsigned char* left) {
        team.each([&](int thread, Own&) {
            for (int i = thread; i < weights; i += Threads)
                shared.x[i] = fixed(x[i]);
            for (int i = thread; i < steps / normalize_every; i += Threads)
                shared.least[i] = 0xffffffffu;
            for (int i = thread; i < row_size; i += Threads)
                row[i] = 0;
            if (thread == 0) {
                shared.end = 0xffffffffu;
                shared.apart = 0;
            }
        });
        // one loop for both passes, so that the steps are compiled once
        for (int first = 0;; first = lead) {
            pass(team, shared, row, scratch, first);
            if (first == 0)
                team.each([&](int thread, Own&) {
                    unsigned least = 0xffffffffu;
                    for (int t = thread; t < 1 << (L - fold(last)); t += Threads) {
                        const unsigned here = static_cast<unsigned>(row[t]) << 16 | static_cast<unsigned>(t);
                        least = here < least ? here : least;
                    }
                    lower(&shared.end, least);
                });
            team.each([&](int thread, Own&) {
                if (thread == 0)
                    shared.outcome = first == 0 ? close(shared, scratch, scratch + decision_words)
                                                : close_from_seam(shared, scratch);
            });
            if (first > 0 || shared.outcome != not_cyclic)
                break;
            team.each([&](int thread, Own&) {
                for (int i = lead / normalize_every + thread; i < steps / normalize_every; i += Threads)
                    shared.least[i] = 0xffffffffu;
                for (int i = thread; i < 1 << (L - fold(seam)); i += Threads)
                    row[i] = static_cast<unsigned>(i) == kept_by_lead(shared.path[0]) ? 0 : row_most;
            });
        }
        team.each([&](int thread, Own&) {
            for (int b = thread; b < 2 * M; b += Threads)
                codes[b] = packed(shared, b);
            for (int i = thread; i < weights; i += Threads) {
                levels[i] = static_cast<float>(byte_sum(state(shared, i) * multiplier) - centre);
                if (!joins(shared, i))
                    shared.apart = 1;
            }
        });
        team.each([&](int thread, Own&) {
            if (thread == 0)
                *left = shared.outcome != found || shared.apart;
        });
    }
};

} // namespace bitpalette

#if defined(__CUDACC__) && defined(TRELLIS_ROW_BITS)

using Search = bitpalette::TileSearch<TRELLIS_ROW_BITS, TRELLIS_WINDOW, TRELLIS_THREADS>;

static_assert(Search::shared_bytes == TRELLIS_SHARED_BYTES, "the launcher gives this much shared memory");
static_assert(Search::scratch_words == TRELLIS_SCRATCH_WORDS, "the launcher gives every block this much");

struct Team {
    Search::Own own;

    template <class Phase>
    __device__ __forceinline__ void each(const Phase& phase) {
        phase(static_cast<int>(threadIdx.x), own);
        __syncthreads();
    }
};

// x [tiles, 256], codes [tiles, 2 M], levels [tiles, 256], left [tiles]; scratch [blocks, scratch_words].
extern "C" __global__ void __launch_bounds__(TRELLIS_THREADS, TRELLIS_THREADS < 1024 ? 1024 / TRELLIS_THREADS : 1)
    trellis_encode(const float* x, long long tiles, unsigned char* codes, float* levels, unsigned char* left,
                   unsigned* scratch) {
    extern __shared__ unsigned short row[];
    __shared__ Search::Shared shared;
    Team team;
    unsigned* const own_scratch = scratch + static_cast<long long>(blockIdx.x) * Search::scratch_words;
    for (long long k = blockIdx.x; k < tiles; k += gridDim.x)
        Search::encode(team, shared, row, own_scratch, x + k * 256, codes + k * 2 * TRELLIS_ROW_BITS, levels + k * 256,
                       left + k);
}

#endif
