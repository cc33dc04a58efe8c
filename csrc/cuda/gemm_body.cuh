// y = x W^T for 1 to 256 tokens, W in codes of the container: matrix instructions in which W is operand A.
//
// A block of threads makes an output tile of 64 BlocksN rows of W and `tokens` tokens. In each step every warp takes
// one superblock (64 x 64) or a share of one, and the tokens' columns, all copied into shared memory some steps before.
// The sums of the warps along K are added at a tile's end; stream_k.cuh says how blocks share tiles.
//
// Scales multiply the sums of a group of columns, not the weights: the values that are multiplied are exact (integers,
// levels), and a scale costs next to nothing. Every sum is taken in the same order each time.
//
// A format (gemm_w4a16.cuh, gemm_w4a8.cuh) says how codes become operands, what a group of columns has, and what the
// total becomes.
#pragma once

#include "gemm_load.cuh"

#include <type_traits>

namespace bitpalette {

template <class Shape, class Format>
class Gemm {
    using Layout = GemmLayout<Shape, Format>;
    using Total = typename Format::Total; // float or int32_t: of all columns
    using Sum = typename Format::Sum;     // of a group's
    static constexpr int token_tiles = Shape::tokens / 8;

    const GemmArgs& args;
    const Layout layout;
    const int lane, warp_k;
    const int warp_n, share;       // this warp's superblock along N; which of the warps that share it this is
    const int blocks_n, blocks_k;  // superblocks of the weight
    const int my_block, my_tokens; // in a stage: this warp's superblock, this lane's columns of a token
    Total* const sums;             // shared memory, [warps_n][warps_k - 1][16][tokens]
    uint8_t* const stages;
    typename Format::Table table;
    Total total[Shape::row_tiles][token_tiles][4];

  public:
    BP_DEVICE Gemm(const GemmArgs& args, uint8_t* shared)
        : args(args), layout(args), lane(ptx::lane()), warp_k(ptx::warp() % Shape::warps_k),
          warp_n(ptx::warp() / Shape::warps_k / Shape::sharing), share(ptx::warp() / Shape::warps_k % Shape::sharing),
          blocks_n((args.rows + block_side - 1) / block_side), blocks_k((args.columns + block_side - 1) / block_side),
          my_block(ptx::keep((warp_n * Shape::warps_k + warp_k) * layout.block)),
          my_tokens(ptx::keep(layout.tokens + lane / 4 * Layout::token_bytes +
                              (warp_k * block_side + lane % 4 * 4) * Format::column_bytes)),
          sums(reinterpret_cast<Total*>(shared + Format::table_bytes)),
          stages(shared + Format::table_bytes + 4 * Shape::sums) {
        Format::fill(args.fragment, shared, Shape::threads / 32);
        ptx::sync_threads();
        table = Format::table(args.fragment, shared);
    }

    BP_DEVICE void run() {
        // a loop each where a group's end inside a superblock would be a branch after every other product
        if constexpr (Format::first_bytes == 0)
            run_with<1>();
        else if constexpr (Shape::tokens > 8)
            run_with<0>();
        else if (args.halves == 2)
            run_with<2>();
        else
            run_with<1>();
    }

  private:
    // Halves: args.halves, or 0 where that is known at run time only.
    template <int Halves>
    BP_DEVICE void run_with() {
        const int end = args.work.begin(ptx::block() + 1);
        GemmPlace at = GemmPlace::of<Shape>(args, args.work.begin(ptx::block()));
        GemmLoader<Shape, Format> loader(args, layout, at, end);
        uint8_t *stage = stages, *free_stage = stages;
        for (int i = 0; i < args.stages - 1; ++i, free_stage += layout.stage)
            loader.copy(free_stage);
        const uint8_t* const last_stage = free_stage;
        while (at.step < end) {
            clear();
            // the steps of this tile that are this block's
            const int rest = args.work.steps - at.k, until = at.step + rest < end ? at.step + rest : end;
            for (; at.step < until; ++at.step, ++at.k) {
                wait();
                // everybody's copies of this step are there, and the stage that was read last is free
                BP_MUTATE(gemm_barrier, (void)0, ptx::sync_threads());
                loader.copy(BP_MUTATE(gemm_live_stage, stage, free_stage));
                compute<Halves>(at, stage);
                free_stage = stage;
                stage = stage == last_stage ? stages : stage + layout.stage;
            }
            finish(at);
            at.template next_tile<Shape>(args);
        }
        ptx::cp_async_wait<0>();
    }

    BP_DEVICE void clear() {
        for_all([](int, Total& sum) { sum = 0; });
    }

    // Until the oldest of the steps under way is there.
    BP_DEVICE void wait() const {
        const int stages = BP_MUTATE(gemm_wait, args.stages + 2, args.stages);
        if (stages > 4)
            ptx::cp_async_wait<4>();
        else if (stages > 3)
            ptx::cp_async_wait<2>();
        else if (stages > 2)
            ptx::cp_async_wait<1>();
        else
            ptx::cp_async_wait<0>();
    }

    template <int Halves>
    BP_DEVICE void compute(const GemmPlace& at, const uint8_t* stage) {
        if (at.n + warp_n >= blocks_n || at.k * Shape::warps_k + warp_k >= blocks_k)
            return;
        const uint8_t *weights = stage + my_block, *tokens = stage + my_tokens;
        BP_UNROLL
        for (int n = 0; n < Shape::row_tiles; ++n)
            multiply<Halves>(weights, share * Shape::row_tiles + n, tokens, total[n]);
    }

    // The 16 rows of one n16 by the tokens, all 64 columns.
    template <int Halves>
    BP_DEVICE void multiply(const uint8_t* weights, int n, const uint8_t* tokens, Total (&into)[token_tiles][4]) {
        const typename Format::Words words = Format::load(table, weights, n, lane);
        const uint8_t* values = weights + layout.superblock;
        const bool two_groups = Halves == 2 || (Halves == 0 && args.halves == 2);
        typename Format::Group group = group_of(values, n, 0);
        if constexpr (Format::scaled) {
            Sum part[token_tiles][4] = {};
            BP_UNROLL
            for (int k = 0; k < Format::multiplies; ++k) {
                if (k == Format::multiplies / 2 && two_groups) {
                    add_scaled(group, part, into);
                    group = group_of(values, n, 1);
                }
                multiply_columns(words, group, k, tokens, part);
            }
            add_scaled(group, part, into);
        } else {
            BP_UNROLL
            for (int k = 0; k < Format::multiplies; ++k) {
                if (k == Format::multiplies / 2 && two_groups)
                    group = group_of(values, n, 1);
                multiply_columns(words, group, k, tokens, into);
            }
        }
    }

    BP_DEVICE typename Format::Group group_of(const uint8_t* values, int n, int half) const {
        const int row = half * block_side + n * tile_side + lane / 4;
        return Format::group(args.fragment, values + row * Format::first_bytes, args.second != nullptr,
                             values + Layout::first_bytes + row);
    }

    // 16 or 32 columns: those of one matrix instruction.
    BP_DEVICE void multiply_columns(const typename Format::Words& words, const typename Format::Group& group, int k,
                                    const uint8_t* tokens, Sum (&into)[token_tiles][4]) {
        uint32_t a[4], b[2];
        Format::fragment(table, group, words, k, a);
        BP_UNROLL
        for (int m = 0; m < token_tiles; ++m) {
            Format::load_tokens(tokens + m * 8 * Layout::token_bytes, BP_MUTATE(gemm_columns, k ^ 1, k), b);
            Format::mma(into[m], a, b);
        }
    }

    // into += scale * part; part = 0.
    BP_DEVICE static void add_scaled(const typename Format::Group& group, Sum (&part)[token_tiles][4],
                                     Total (&into)[token_tiles][4]) {
        BP_UNROLL
        for (int m = 0; m < token_tiles; ++m)
            BP_UNROLL
        for (int i = 0; i < 4; ++i) {
            into[m][i] = ptx::fma(i < 2 ? group.scale : group.scale8, Format::value(part[m][i]), into[m][i]);
            part[m][i] = 0;
        }
    }

    // A tile's sums, or a part of them, are complete: along K within the block, then across blocks.
    BP_DEVICE void finish(const GemmPlace& at) {
        add_warps();
        const int first = args.work.owner(at.tile * args.work.steps);
        const int last = args.work.owner((at.tile + 1) * args.work.steps - 1);
        if (first != last && !add_parts(at.tile, first, last))
            return;
        if (warp_k == 0)
            store(at);
    }

    BP_DEVICE int warp_of_n() const { return warp_n * Shape::sharing + share; }

    // Into the sums of the warps with warp_k = 0, in the order of warp_k.
    BP_DEVICE void add_warps() {
        if constexpr (Shape::warps_k > 1) {
            constexpr int values = tile_side * Shape::tokens; // of one n16
            BP_UNROLL
            for (int n = 0; n < Shape::row_tiles; ++n) {
                if (warp_k > 0)
                    each(total[n], [&](int i, Total& sum) {
                        sums[(warp_of_n() * (Shape::warps_k - 1) + warp_k - 1) * values + 32 * i + lane] = sum;
                    });
                BP_MUTATE(gemm_sum_barrier, (void)0, ptx::sync_threads());
                if (warp_k == 0)
                    for (int other = 0; other < Shape::warps_k - 1; ++other)
                        each(total[n], [&](int i, Total& sum) {
                            sum += sums[(warp_of_n() * (Shape::warps_k - 1) + other) * values + 32 * i + lane];
                        });
                BP_MUTATE(gemm_sum_reuse, (void)0, ptx::sync_threads());
            }
        }
    }

    // Stores this block's part of a tile. In the block that comes last, adds up all parts, and says true.
    BP_DEVICE bool add_parts(int tile, int first, int last) {
        if (warp_k == 0) {
            uint32_t* mine = part_of(tile, ptx::block());
            for_all([&](int i, Total& sum) { ptx::st_cg(mine + 32 * i, bits(sum)); });
            BP_MUTATE(gemm_part_fence, (void)0, ptx::fence());
        }
        ptx::sync_threads();
        if (ptx::thread() == 0) {
            *arrival() = ptx::atomic_add(args.arrived + tile, 1);
            // what those who came before have stored is seen from here on, by all behind the barrier
            BP_MUTATE(gemm_part_fence, (void)0, ptx::fence());
        }
        ptx::sync_threads();
        const bool all = *arrival() == static_cast<unsigned>(last - first);
        ptx::sync_threads(); // before the next tile's
        if (!all)
            return false;
        if (ptx::thread() == 0)
            BP_MUTATE(gemm_counter_left, (void)0, args.arrived[tile] = 0);
        if (warp_k == 0) {
            clear();
            for (int from = first; from <= last; ++from) {
                const uint32_t* part = part_of(tile, from);
                for_all([&](int i, Total& sum) { sum += value_of(ptx::ld_cg(part + 32 * i)); });
            }
        }
        return true;
    }

    // This lane's first value in the part of a tile that a share has made.
    BP_DEVICE uint32_t* part_of(int tile, int from) const {
        constexpr int64_t values = Shape::row_tiles * tile_side * Shape::tokens; // of a warp
        return args.parts + (part_slot(args.work, from, tile) * Shape::warps_n + warp_of_n()) * values + lane;
    }

    // A word of shared memory that nothing else uses.
    BP_DEVICE unsigned* arrival() const { return reinterpret_cast<unsigned*>(stages + args.stages * layout.stage); }

    BP_DEVICE static uint32_t bits(float value) { return ptx::float_as_uint(value); }
    BP_DEVICE static uint32_t bits(int32_t value) { return static_cast<uint32_t>(value); }
    BP_DEVICE static Total value_of(uint32_t word) {
        if constexpr (std::is_same_v<Total, float>)
            return ptx::uint_as_float(word);
        else
            return static_cast<Total>(word);
    }

    // y of this warp's rows. Lane 4g + t has rows g and g + 8 of tokens 2t and 2t + 1.
    BP_DEVICE void store(const GemmPlace& at) {
        using Act = typename Format::Act;
        const int first_row = (at.n + warp_n) * block_side + share * Shape::row_tiles * tile_side + lane / 4;
        const int first_token = at.token + lane % 4 * 2;
        uint16_t* const y = static_cast<uint16_t*>(args.y);
        BP_UNROLL
        for (int n = 0; n < Shape::row_tiles; ++n)
            BP_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + n * tile_side + 8 * half;
            if (BP_MUTATE(gemm_row_edge, row > args.rows, row >= args.rows))
                continue;
            const typename Format::Row of_row = Format::row(args, row);
            const float bias = args.bias ? Act::unpack(static_cast<const uint16_t*>(args.bias)[row]).x : 0.0f;
            BP_UNROLL
            for (int m = 0; m < token_tiles; ++m)
                BP_UNROLL
            for (int i = 0; i < 2; ++i) {
                const int token = first_token + 8 * m + i;
                if (token < args.tokens) {
                    const float value = Format::result(args, of_row, token, total[n][m][2 * half + i]);
                    y[token * args.y_stride + row] = static_cast<uint16_t>(Act::pack(ptx::add(value, bias), 0.0f));
                }
            }
        }
    }

    template <class Do>
    BP_DEVICE static void each(Total (&of)[token_tiles][4], Do&& act) {
        BP_UNROLL
        for (int m = 0; m < token_tiles; ++m)
            BP_UNROLL
        for (int i = 0; i < 4; ++i)
            act(4 * m + i, of[m][i]);
    }
    template <class Do>
    BP_DEVICE void for_all(Do&& act) {
        BP_UNROLL
        for (int n = 0; n < Shape::row_tiles; ++n)
            each(total[n], [&](int i, Total& sum) { act(n * token_tiles * 4 + i, sum); });
    }
};

template <class Shape, class Format>
BP_GLOBAL BP_LAUNCH_BOUNDS(Shape::threads, Shape::tokens <= 8 ? 2 : 1) void gemm_kernel(GemmArgs args) {
    BP_DYNAMIC_SHARED(shared);
    Gemm<Shape, Format>(args, shared).run();
}

} // namespace bitpalette
