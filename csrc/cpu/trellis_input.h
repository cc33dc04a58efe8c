// The input as trellis kernels multiply it: vectors of integers, one or two a token, each with a scale for 256 columns.
//
//     int8_by_256     one vector, the codes
//     int16_by_256    one vector, 256 * code + low
//     f32             two vectors, high and low, of x = (2^15 * high + low) * scale: 29 bits below the largest of 256
//                     columns, none below 2^-126. Products and sums of integers are exact, so y is nearer to x W^T than
//                     a sum in float32 is
//
// A level is the sum of four bytes minus 510. Kernels add up products of byte sums, from a start of -510 times the sum
// of the input: `offset`, split by pairs of columns, so that no 32-bit sum of a block leaves its range: the largest is
// 128 columns * 510 * 32512 < 2^31, and what wraps around on the way comes back.
#pragma once

#include <cstdint>
#include <vector>

#include "activations.h"
#include "trellis_code.h"

namespace bitpalette {

constexpr int trellis_pairs = trellis_side / 2; // of columns in a tile's row
constexpr int trellis_block = 256;              // columns that share a scale of the input
constexpr int trellis_block_tiles = trellis_block / trellis_side;
constexpr int trellis_most_vectors = 8; // of one call: more sums than that leave no registers to decode in

// Up to 8 vectors, zero from the input's last column to the end of the row.
struct TrellisVectors {
    const int16_t* values; // [n, row]
    const int8_t* twice;   // [n, 2 * row] each value twice, in 8 bits; null where values need 16
    const int32_t* offset; // [n, blocks, 8]: of columns 2 j and 2 j + 1 of all tiles of a block
    const float* scale;    // [n, blocks]
    int64_t row, blocks;
    int n;
};

class TrellisInput {
  public:
    // x has `form` ready. Buffers are kept from call to call.
    void set(const Activations& x, InputForm form);

    int vectors_per_token() const { return per_token_; }
    int64_t vectors() const { return vectors_; }
    TrellisVectors part(int64_t first, int n) const;

  private:
    void set_int8(const Int8Blocks& x);
    void set_int16(const Int8Blocks& x);
    void set_floats(const FloatInput& x);
    void add_offsets();

    int per_token_ = 1;
    int64_t vectors_ = 0, row_ = 0, columns_ = 0, blocks_ = 0;
    bool narrow_ = false;
    std::vector<int16_t> values_;
    std::vector<int8_t> twice_;
    std::vector<int32_t> offset_;
    std::vector<float> scale_;
};

} // namespace bitpalette
