// What the GEMMs of gemm_body.cuh are told, the sizes of a block's work, and where things lie in its shared memory.
#pragma once

#include "fragment.cuh"
#include "stream_k.cuh"

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
        block = superblock;
        if (Format::first_bytes > 0)
            block += first_bytes + (args.second ? second_bytes : 0);
        tokens = block * Shape::blocks_n * Shape::warps_k;
        stage = tokens + Shape::tokens * token_bytes;
    }
    BP_HOST_DEVICE int shared_bytes(int stages) const {
        return Format::table_bytes + 4 * Shape::sums + stages * stage + 16; // and a word to say who came last
    }
};

// A step: which of all, of which output tile, where along K; and the tile's first superblock along N and first token.
struct GemmPlace {
    int step, tile, k, n, token;

    template <class Shape>
    BP_DEVICE static GemmPlace of(const GemmArgs& args, int step) {
        const int tile = step / args.work.steps, token_blocks = (args.tokens + Shape::tokens - 1) / Shape::tokens;
        // tiles of the same weights follow each other: the L2 has them
        return {step, tile, step - tile * args.work.steps, tile / token_blocks * Shape::blocks_n,
                tile % token_blocks * Shape::tokens};
    }
    // Its first step's place along K; `step` is already that of it.
    template <class Shape>
    BP_DEVICE void next_tile(const GemmArgs& args) {
        k = 0;
        ++tile;
        token += Shape::tokens;
        if (token >= args.tokens) {
            token = 0;
            n += Shape::blocks_n;
        }
    }
};

} // namespace bitpalette
