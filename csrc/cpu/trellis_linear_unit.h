// What each instruction set's translation unit of trellis_linear provides, and what it is given.
#pragma once

#include "panel_gemm_unit.h"
#include "trellis_decode.h"
#include "trellis_input.h"

namespace bitpalette {

constexpr int trellis_piece = 16; // bytes that hold all windows of a tile's row

// Where the windows of a tile's rows are, for one m. Columns 2 j and 2 j + 1 are at most 5 bits apart, so four bytes
// from the first one's first byte on hold both windows.
struct alignas(64) TrellisRowWindows {
    uint8_t pick[trellis_side][trellis_pairs][4]; // of the piece, lowest first; 0x80 where a zero belongs
    uint32_t right[trellis_side][trellis_pairs];  // brings the first window to bit 0
    uint32_t left[trellis_side][trellis_pairs];   // brings the second window to bit 16
    int64_t begin[trellis_side];                  // of the piece, in bytes from the tile's first; the last one's wraps
};

const TrellisRowWindows& trellis_row_windows(const TrellisCode& code);

// sums [x.n, 16] = x W'^T for the 16 rows W' of a row of tiles, in units of scale / 128
using TrellisMultiply = void (*)(const TrellisWeight& w, const TrellisVectors& x, int64_t tile_row, float* sums);
// rows index[begin..end-1] (null: begin..end-1 themselves) of W to y + i * in
using TrellisDecode = void (*)(const TrellisWeight& w, const int64_t* index, int64_t begin, int64_t end, float* y);

// int16 [8 tiles, 16 rows, 2] = levels + 510 of tiles first..first+tiles-1 in a row of them, as in panel.h. panel: what
// rows are interleaved with.
using TrellisUnpack = void (*)(const TrellisWeight& w, int64_t tile_row, int64_t first, int64_t tiles,
                               const PanelUnit& panel, uint8_t* to);

struct TrellisLinearUnit {
    TrellisMultiply multiply;
    TrellisDecode decode;
    TrellisUnpack unpack; // null: there is none
};

// std::invalid_argument for sizes, rates or windows that do not exist, or a missing instruction set.
TrellisLinearUnit trellis_linear_unit(Isa isa, const TrellisWeight& w);

extern const TrellisLinearUnit trellis_linear_scalar;
#if BITPALETTE_X86
extern const TrellisLinearUnit trellis_linear_avx2;
extern const TrellisLinearUnit trellis_linear_avxvnni;
extern const TrellisLinearUnit trellis_linear_avx512;
extern const TrellisMultiply trellis_multiply_avx512vbmi;
extern const TrellisUnpack trellis_unpack_avx512vbmi;
#endif
#if BITPALETTE_AARCH64
extern const TrellisLinearUnit trellis_linear_neon;
#endif

} // namespace bitpalette
