// What every native linear kernel is, so that a layer, layers that share an input and the decoder call all alike.
#pragma once

#include <cstdint>
#include <memory>

#include "activations.h"
#include "panel.h"

namespace bitpalette {

constexpr int64_t linear_block_rows = 16;

// A weight W [out, in] in a kernel's own layout; it does not own the tensors it reads.
class LinearWeight {
  public:
    LinearWeight(int64_t out, int64_t in) : out(out), in(in) {}
    virtual ~LinearWeight() = default;
    LinearWeight(const LinearWeight&) = delete;
    LinearWeight& operator=(const LinearWeight&) = delete;

    // Which form of the input `multiply` reads.
    virtual InputForm form() const = 0;
    // Read by one multiply, for deciding how many threads are worth waking.
    virtual int64_t bytes() const = 0;
    // y[t * y_row + r] = (x W^T)[t, r] for the rows r of blocks begin..end-1, 16 rows each, of which the last may be
    // short. Any number of tokens. Called from several threads at a time.
    virtual void multiply(const Activations& x, float* y, int64_t y_row, int64_t begin, int64_t end) const = 0;
    // rows[i * in ...] = row index[i] of W as the codec decodes it, for i in begin..end-1.
    virtual void decode(const int64_t* index, int64_t begin, int64_t end, float* rows) const = 0;

    // How the weight is unpacked for many tokens; null: `multiply` is for any number of them. Where the panel is of
    // type f32, rows come from `decode`, else from `unpack`.
    virtual const PanelKind* panel() const { return nullptr; }
    // Rows 16 * block.. and columns begin..end-1, of which begin is a multiple of the span and end of 32: it may be
    // beyond the last one.
    virtual void unpack(int64_t block, int64_t begin, int64_t end, const PanelBlock& to) const;

    int64_t blocks() const { return (out + linear_block_rows - 1) / linear_block_rows; }

    const int64_t out, in;
};

// One weight of several that read the same input.
struct LinearOutput {
    const LinearWeight* weight;
    float* y; // [tokens, y_row]
    int64_t y_row;
};

// All outputs of one input, in one parallel region: x is brought into the forms the weights read first. From as many
// tokens on as a weight's `panel` says it is multiplied piece by piece (panel_gemm.h).
void linear_group(const LinearOutput* outputs, int n, Activations& x, int threads);

// rows [n, in] = rows `index` of W. std::invalid_argument for an index out of range.
void linear_rows(const LinearWeight& w, const int64_t* index, int64_t n, float* rows, int threads);

// y [tokens, out] of dtype = the outputs in float32 plus bias [out] of that type (null: none), rounded. from may be y.
void store_outputs(Isa isa, const float* from, int64_t from_row, int64_t tokens, int64_t out, const void* bias,
                   Dtype dtype, void* y);

} // namespace bitpalette
