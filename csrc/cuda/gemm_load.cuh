// The copies of a GEMM into shared memory, a step at a time: every warp its superblock, or its share of one, with what
// belongs to the groups, and all threads together the tokens' columns.
//
// In a tile addresses depend on the step alone, by a multiply-add: what they begin with is computed once a tile. With
// eight tokens a lane decodes 128 weights in a step, so that 13 instructions here are 0.1 of a weight's.
#pragma once

#include "gemm_args.cuh"

namespace bitpalette {

template <class Shape, class Format>
class GemmLoader {
    using Layout = GemmLayout<Shape, Format>;
    static constexpr int step_bytes = block_side * Shape::warps_k * Format::column_bytes; // of a token's row
    static constexpr int pieces = step_bytes / 16;
    static constexpr int together = Shape::threads / pieces; // tokens that all threads copy at once

    const GemmArgs& args;
    const Layout& layout;
    const int lane, warp_k, warp_n, share; // as in Gemm
    const int blocks_n, blocks_k;          // superblocks of the weight
    const int end;                         // of the block's steps
    const int to_code, to_x;               // in a stage: where this thread's bytes of codes and of tokens go
    const int my_codes;                    // of a superblock's bytes, from this thread's first on
    GemmPlace at;
    // of the tile, for step 0 of it and this thread
    const uint8_t *codes, *first, *second, *x;
    int my_blocks; // superblocks along K from this warp's first on, none where it has no rows
    int my_tokens; // from this thread's first on
    int my_bytes;  // of a token's row from this thread's first on

  public:
    BP_DEVICE GemmLoader(const GemmArgs& args, const Layout& layout, const GemmPlace& begin, int end)
        : args(args), layout(layout), lane(ptx::lane()), warp_k(ptx::warp() % Shape::warps_k),
          warp_n(ptx::warp() / Shape::warps_k / Shape::sharing), share(ptx::warp() / Shape::warps_k % Shape::sharing),
          blocks_n((args.rows + block_side - 1) / block_side), blocks_k((args.columns + block_side - 1) / block_side),
          end(end), to_code(ptx::keep((warp_n * Shape::warps_k + warp_k) * layout.block + my_code())),
          to_x(ptx::keep(layout.tokens + my_token() * Layout::token_bytes + int(ptx::thread()) % pieces * 16)),
          my_codes(ptx::keep(layout.superblock - my_code())), at(begin) {
        begin_tile();
    }

    // Starts the copies of the next step, and commits them as one group; an empty group beyond the end.
    BP_DEVICE void copy(uint8_t* stage) {
        if (at.step < end) {
            if (at.k * Shape::warps_k < my_blocks)
                copy_weights(stage + to_code);
            copy_tokens(stage + to_x);
            ++at.step;
            if (++at.k == args.work.steps) {
                at.template next_tile<Shape>(args);
                begin_tile();
            }
        }
        ptx::cp_async_commit();
    }

  private:
    BP_DEVICE void begin_tile() {
        const int n = at.n + warp_n;
        my_blocks = n < blocks_n ? blocks_k - warp_k : 0;
        codes = args.codes + static_cast<int64_t>(n * blocks_k + warp_k) * layout.superblock + my_code();
        first = group_values<Format::first_bytes>(args.first, n);
        second = group_values<1>(args.second, n);
        const int token = at.token + my_token(), byte = ptx::thread() % pieces * 16;
        x = static_cast<const uint8_t*>(args.x) + token * args.x_stride + byte;
        my_tokens = args.tokens - token;
        my_bytes = args.row_bytes - byte;
    }

    // Where the thread's bytes of a superblock begin, and which token is its first.
    BP_DEVICE int my_code() const { return 16 * (32 * share + lane); }
    BP_DEVICE int my_token() const { return ptx::thread() / pieces; }

    BP_DEVICE void copy_weights(uint8_t* to) const {
        constexpr int sweep = 16 * 32 * Shape::sharing;
        const uint8_t* from = codes + static_cast<int64_t>(at.k) * (Shape::warps_k * layout.superblock);
        BP_UNROLL
        for (int more = 0; more < Format::most_bytes; more += sweep)
            if (more + sweep <= Format::least_bytes || more < my_codes)
                ptx::cp_async16(to + more, from + more, true);
        if constexpr (Format::first_bytes > 0)
            if (share == 0) {
                const int k = at.k * Shape::warps_k + warp_k;
                const int group = args.halves == 2 ? 2 * k : k >> args.group_shift;
                to += layout.superblock;
                copy_group_values<Format::first_bytes>(first, group, to);
                if (args.second)
                    copy_group_values<1>(second, group, to + Layout::first_bytes);
            }
    }

    // Of 64 rows' values of Bytes bytes, 16 bytes a lane, for one group or two: this lane's in group 0. With share 0 it
    // writes them as far from the first as its codes.
    template <int Bytes>
    BP_DEVICE const uint8_t* group_values(const uint8_t* values, int n) const {
        if constexpr (Bytes == 0)
            return nullptr;
        else {
            constexpr int lanes = block_side * Bytes / 16;
            const int64_t row = lane / lanes * static_cast<int64_t>(padded_rows()) + n * block_side;
            return values + row * Bytes + lane % lanes * 16;
        }
    }
    template <int Bytes>
    BP_DEVICE void copy_group_values(const uint8_t* values, int group, uint8_t* to) const {
        constexpr int lanes = block_side * Bytes / 16;
        if (lane / lanes < args.halves)
            ptx::cp_async16(to, values + static_cast<int64_t>(group) * (padded_rows() * Bytes), true);
    }
    BP_DEVICE int padded_rows() const { return blocks_n * block_side; }

    // 16 bytes of a token's columns a thread, of several tokens.
    BP_DEVICE void copy_tokens(uint8_t* to) const {
        const int byte = at.k * step_bytes;
        const uint8_t* from = x + byte;
        BP_UNROLL
        for (int more = 0; more < Shape::tokens; more += together) {
            const bool inside = BP_MUTATE(gemm_edge, true, more < my_tokens && byte < my_bytes);
            if (together <= Shape::tokens || my_token() < Shape::tokens)
                ptx::cp_async16(to + more * Layout::token_bytes, from + more * args.x_stride, inside);
        }
    }
};

} // namespace bitpalette
