// y = x W^T for many tokens: pieces of W are unpacked to a panel in the first-level cache (panel.h) and multiplied
// there with the tokens, a block of them at a time, in integers as wide as the weight's `panel` says.
//
// Of W a tile of rows (32 with AVX-512) times a few hundred columns is unpacked at a time, so that memory is bounded,
// the sums of all tokens stay beside it, and every code is unpacked once:
//
//     for a tile of rows             split over threads; the result of a row does not depend on the split
//         for a piece of columns     unpack: 16 KiB
//             for a block of tokens  12 tokens x 32 rows in registers
#pragma once

#include <cstdint>
#include <vector>

#include "panel_gemm_unit.h"

namespace bitpalette {

class LinearWeight;

// The input in the order in which tiles meet it: blocks of tokens, in each the words of 4 bytes of a step side by side.
class PanelInput {
  public:
    // Brings x into the form first, then into order. Buffers are kept from call to call.
    void set(Activations& x, const PanelKind& kind, int threads);
    bool serves(const PanelKind& kind) const { return kind_.same_input(kind); }

    int64_t tokens() const { return tokens_; }
    int64_t blocks() const { return blocks_; }
    // Of a block of tokens; blocks() gives the end.
    int64_t first(int64_t block) const { return tokens_ * block / blocks_; }
    // What a piece has of the input, from a column on, a multiple of the span.
    void fill(PanelPiece& piece, int64_t block, int64_t column) const;

  private:
    void order(const Activations& x, int64_t block);

    PanelKind kind_{};
    int64_t tokens_ = 0, blocks_ = 1, columns_ = 0, spans_ = 0;
    std::vector<uint32_t> words_;
    std::vector<int32_t> start_;
    std::vector<float> scale_, sum_;
};

// Tiles of a weight that has a panel.
int64_t panel_tiles(const LinearWeight& w);

// y[t * y_row + r] = (x W^T)[t, r] for the rows r of tiles begin..end-1. Called from several threads at a time.
void panel_multiply(const LinearWeight& w, const PanelInput& x, float* y, int64_t y_row, int64_t begin, int64_t end);

} // namespace bitpalette
