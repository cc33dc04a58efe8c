// What each instruction set's translation unit of trellis_linear provides, and what it is given.
#pragma once

#include "trellis_linear.h"

namespace bitpalette {

constexpr int trellis_piece = 16; // bytes that hold all windows of a tile's row

// Where the 16 windows of a tile's row r are, for one m.
struct alignas(64) TrellisRowWindows {
    uint8_t pick[trellis_side][4]; // per column: bytes of the piece, lowest first; 0x80 where a zero belongs
    uint32_t shift[trellis_side];  // per column: from the lowest picked bit to the window's first
    int64_t begin;                 // of the piece, in bytes from the tile's first; the last row's piece wraps
};

struct TrellisTileWindows {
    TrellisRowWindows row[trellis_side];
};

struct TrellisLinearUnit {
    // y [tokens, out], the outputs of rows of tiles begin..end-1 only; x [tokens, x_row], zero from `in` to 16 * tiles;
    // pieces: room for 16 bytes a tile
    void (*linear)(const TrellisWeight& w, const TrellisTileWindows& windows, const float* x, int64_t x_row,
                   int64_t tokens, float* y, int64_t begin, int64_t end, uint8_t* pieces);
    // rows index[begin..end-1] (null: begin..end-1 themselves) of W to y + i * in
    void (*decode)(const TrellisWeight& w, const TrellisTileWindows& windows, const int64_t* index, int64_t begin,
                   int64_t end, float* y, uint8_t* pieces);
};

// What a call runs with. std::invalid_argument for sizes, rates or windows that do not exist, or a missing instruction
// set.
struct TrellisDecoder {
    const TrellisLinearUnit& unit;
    const TrellisTileWindows& windows;
};
TrellisDecoder trellis_decoder(Isa isa, const TrellisWeight& w);

// As many of `threads` as are worth waking for decoding so many weights.
int trellis_threads(int64_t weights, int threads);

// 16 bytes for each tile of a row of tiles: one room a thread, kept between calls.
uint8_t* trellis_pieces_room(const TrellisWeight& w);

extern const TrellisLinearUnit trellis_linear_scalar;
#if BITPALETTE_X86
extern const TrellisLinearUnit trellis_linear_avx2;
extern const TrellisLinearUnit trellis_linear_avx512;
#endif

} // namespace bitpalette
