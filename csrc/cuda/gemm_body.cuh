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

#include "fragment.cuh"
#include "stream_k.cuh"

#include <type_traits>

namespace bitpalette {

struct GemmArgs {
    const void* x;    // [tokens][x_stride]: fp16, bf16 or int8, rows on 16 bytes
    int64_t x_stride; // in bytes, a multiple of 16
    const uint8_t* codes;
    const uint8_t* first;     // [groups][padded rows], what the format wants of a group: scales of one kind or another
    const uint8_t* second;    // [groups][padded rows] uint8, zero points or offsets; or null
    const uint16_t* scale;    // fp16 [padded rows], of formats with one a row
    const uint8_t* row_zero;  // [padded rows] zero points, of formats with one a row; or null
    const float* token_scale; // [tokens], of int8 activations
    const int32_t* token_sum; // [tokens], sums of int8 activations
    const void* bias;         // [rows] in the type of y, or null
    void* y;                  // fp16 or bf16 [tokens][y_stride]
    int64_t y_stride;         // in elements
    uint32_t* parts;          // stream_k.cuh: [2 shares][rows * tokens of a tile]
    unsigned* arrived;        // [tiles], all zero; left so
    int tokens, rows, columns;
    int row_bytes;   // of x that are read, a multiple of 16: beyond are zeros
    int halves;      // groups in a superblock: 2 where 32 columns share a scale, else 1
    int group_shift; // log2 of the superblocks in a group; 30 for one group
    int stages;      // steps under way: 2, 3, 4 or 6
    FragmentArgs fragment;
    StreamK work;
};

// Tokens of a block; its superblocks along N and along K; the warps that share a superblock, 64 / Sharing rows each.
template <int Tokens, int BlocksN, int BlocksK, int Sharing = 1>
struct GemmShape {
    static constexpr int tokens = Tokens, blocks_n = BlocksN, warps_k = BlocksK, sharing = Sharing;
    static constexpr int warps_n = BlocksN * Sharing;
    static constexpr int threads = 32 * warps_n * warps_k;
    static constexpr int row_tiles = tiles_along / Sharing;                   // of a warp
    static constexpr int sums = warps_n * (warps_k - 1) * tile_side * Tokens; // words: of the warps along K, one n16
};

template <class Shape, class Format>
struct GemmLayout {
    static constexpr int first_bytes = 2 * block_side * Format::first_bytes; // of two groups of a superblock's rows
    static constexpr int second_bytes = 2 * block_side;
    // 32 bytes of 16-bit or 16 of 8-bit tokens more than a row has spread eight rows over all banks
    static constexpr int token_bytes = (block_side * Shape::warps_k + 16) * Format::column_bytes;

    int superblock; // bytes of its codes
    int block;      // the same with what belongs to its groups
    int tokens;     // where a stage's tokens begin
    int stage;

    BP_HOST_DEVICE explicit GemmLayout(const GemmArgs& args) {
        superblock = Format::superblock_bytes(args.fragment);
        block = superblock + first_bytes + (args.second ? second_bytes : 0);
        tokens = block * Shape::blocks_n * Shape::warps_k;
        stage = tokens + Shape::tokens * token_bytes;
    }
    BP_HOST_DEVICE int shared_bytes(int stages) const {
        return Format::table_bytes + 4 * Shape::sums + stages * stage + 16; // and a word to say who came last
    }
};

template <class Shape, class Format>
class Gemm {
    using Layout = GemmLayout<Shape, Format>;
    using Total = typename Format::Total; // float or int32_t: of all columns
    using Sum = typename Format::Sum;     // of a group's
    static constexpr int token_tiles = Shape::tokens / 8;

    const GemmArgs& args;
    const Layout layout;
    const int lane, warp_k;
    const int warp_n, share;      // this warp's superblock along N; which of the warps that share it this is
    const int blocks_n, blocks_k; // superblocks of the weight
    const int token_blocks;       // output tiles along the tokens
    Total* const sums;            // shared memory, [warps_n][warps_k - 1][16][tokens]
    uint8_t* const stages;
    typename Format::Table table;
    Total total[Shape::row_tiles][token_tiles][4];

  public:
    BP_DEVICE Gemm(const GemmArgs& args, uint8_t* shared)
        : args(args), layout(args), lane(ptx::lane()), warp_k(ptx::warp() % Shape::warps_k),
          warp_n(ptx::warp() / Shape::warps_k / Shape::sharing), share(ptx::warp() / Shape::warps_k % Shape::sharing),
          blocks_n((args.rows + block_side - 1) / block_side), blocks_k((args.columns + block_side - 1) / block_side),
          token_blocks((args.tokens + Shape::tokens - 1) / Shape::tokens),
          sums(reinterpret_cast<Total*>(shared + Format::table_bytes)),
          stages(shared + Format::table_bytes + 4 * Shape::sums) {
        Format::fill(args.fragment, shared, Shape::threads / 32);
        ptx::sync_threads();
        table = Format::table(args.fragment, shared);
    }

    BP_DEVICE void run() {
        const int end = args.work.begin(ptx::block() + 1);
        Place at = place(args.work.begin(ptx::block())), ahead = at;
        uint8_t *stage = stages, *free_stage = stages;
        for (int i = 0; i < args.stages - 1; ++i, free_stage += layout.stage)
            copy(ahead, end, free_stage);
        const uint8_t* const last_stage = free_stage;
        while (at.step < end) {
            clear();
            // the steps of this tile that are this block's
            const int rest = args.work.steps - at.k, until = at.step + rest < end ? at.step + rest : end;
            for (; at.step < until; ++at.step, ++at.k) {
                wait();
                // everybody's copies of this step are there, and the stage that was read last is free
                BP_MUTATE(gemm_barrier, (void)0, ptx::sync_threads());
                copy(ahead, end, BP_MUTATE(gemm_live_stage, stage, free_stage));
                compute(at, stage);
                free_stage = stage;
                stage = stage == last_stage ? stages : stage + layout.stage;
            }
            finish(at);
            next_tile(at);
        }
        ptx::cp_async_wait<0>();
    }

  private:
    // A step, and what it is about: of which output tile and where along K, and the tile's first superblock and token.
    struct Place {
        int step, tile, k, n, token;
    };
    BP_DEVICE Place place(int step) const {
        const int tile = step / args.work.steps;
        // tiles of the same weights follow each other: the L2 has them
        return {step, tile, step - tile * args.work.steps, tile / token_blocks * Shape::blocks_n,
                tile % token_blocks * Shape::tokens};
    }
    BP_DEVICE void next_tile(Place& at) const {
        at.k = 0;
        ++at.tile;
        at.token += Shape::tokens;
        if (at.token >= args.tokens) {
            at.token = 0;
            at.n += Shape::blocks_n;
        }
    }

    BP_DEVICE void clear() {
        for_all([](int, Total& sum) { sum = 0; });
    }

    // Starts the copies of one step, and commits them as one group; an empty group beyond the end.
    BP_DEVICE void copy(Place& at, int end, uint8_t* stage) {
        if (at.step < end) {
            const int n = at.n + warp_n, k = at.k * Shape::warps_k;
            if (n < blocks_n && k + warp_k < blocks_k)
                copy_weights(n, k + warp_k, stage + (warp_n * Shape::warps_k + warp_k) * layout.block);
            copy_tokens(at.token, k * block_side * Format::column_bytes, stage + layout.tokens);
            ++at.step;
            if (++at.k == args.work.steps)
                next_tile(at);
        }
        ptx::cp_async_commit();
    }

    BP_DEVICE void copy_weights(int n, int k, uint8_t* shared) {
        const int mine = 16 * (32 * share + lane);
        const uint8_t* from = args.codes + static_cast<int64_t>(n * blocks_k + k) * layout.superblock + mine;
        uint8_t* to = shared + mine;
        BP_UNROLL
        for (int at = 0; at < layout.superblock; at += 16 * 32 * Shape::sharing)
            if (layout.superblock % (16 * 32 * Shape::sharing) == 0 || at + mine < layout.superblock)
                ptx::cp_async16(to + at, from + at, true);
        if (share == 0 && (Format::first_bytes || args.second)) {
            const int64_t padded = static_cast<int64_t>(blocks_n) * block_side;
            const int group = args.halves == 2 ? 2 * k : k >> args.group_shift;
            to = shared + layout.superblock;
            if constexpr (Format::first_bytes > 0)
                copy_group_values<Format::first_bytes>(args.first, padded, group, n, to);
            if (args.second)
                copy_group_values<1>(args.second, padded, group, n, to + Layout::first_bytes);
        }
    }

    // 64 rows' values of Bytes bytes, 16 bytes a lane, for one group or two.
    template <int Bytes>
    BP_DEVICE void copy_group_values(const uint8_t* values, int64_t padded, int group, int n, uint8_t* shared) {
        constexpr int lanes = block_side * Bytes / 16;
        if (lane / lanes < args.halves) {
            const int64_t row = (group + lane / lanes) * padded + n * block_side;
            ptx::cp_async16(shared + 16 * lane, values + row * Bytes + lane % lanes * 16, true);
        }
    }

    // 16 bytes of a token's columns a thread, of several tokens.
    BP_DEVICE void copy_tokens(int first, int byte, uint8_t* shared) {
        constexpr int pieces = block_side * Shape::warps_k * Format::column_bytes / 16; // of a token
        constexpr int together = Shape::threads / pieces;                               // tokens
        const int token = first + ptx::thread() / pieces, column = byte + ptx::thread() % pieces * 16;
        const uint8_t* from = static_cast<const uint8_t*>(args.x) + token * args.x_stride + column;
        uint8_t* to = shared + ptx::thread() / pieces * Layout::token_bytes + ptx::thread() % pieces * 16;
        BP_UNROLL
        for (int more = 0; more < Shape::tokens; more += together) {
            const bool inside = BP_MUTATE(gemm_edge, true, token + more < args.tokens && column < args.row_bytes);
            if (together <= Shape::tokens || token - first < Shape::tokens)
                ptx::cp_async16(to + more * Layout::token_bytes, from + more * args.x_stride, inside);
        }
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

    BP_DEVICE void compute(const Place& at, const uint8_t* stage) {
        if (at.n + warp_n >= blocks_n || at.k * Shape::warps_k + warp_k >= blocks_k)
            return;
        const uint8_t* weights = stage + (warp_n * Shape::warps_k + warp_k) * layout.block;
        const uint8_t* tokens = stage + layout.tokens + lane / 4 * Layout::token_bytes +
                                (warp_k * block_side + lane % 4 * 4) * Format::column_bytes;
        BP_UNROLL
        for (int n = 0; n < Shape::row_tiles; ++n)
            multiply(weights, share * Shape::row_tiles + n, tokens, total[n]);
    }

    // The 16 rows of one n16 by the tokens, all 64 columns.
    BP_DEVICE void multiply(const uint8_t* weights, int n, const uint8_t* tokens, Total (&into)[token_tiles][4]) {
        const typename Format::Words words = Format::load(table, weights, n, lane);
        const uint8_t* values = weights + layout.superblock;
        typename Format::Group group = group_of(values, n, 0);
        if constexpr (Format::scaled) {
            Sum part[token_tiles][4] = {};
            BP_UNROLL
            for (int k = 0; k < Format::multiplies; ++k) {
                if (k == Format::multiplies / 2 && args.halves == 2) {
                    add_scaled(group, part, into);
                    group = group_of(values, n, 1);
                }
                multiply_columns(words, group, k, tokens, part);
            }
            add_scaled(group, part, into);
        } else {
            BP_UNROLL
            for (int k = 0; k < Format::multiplies; ++k) {
                if (k == Format::multiplies / 2 && args.halves == 2)
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
    BP_DEVICE void finish(const Place& at) {
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
    BP_DEVICE void store(const Place& at) {
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
