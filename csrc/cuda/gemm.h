// The launchers of the GEMMs: which kernel, how many blocks, how much memory; then the launch.
#pragma once

#include <cstdint>

namespace bitpalette {

enum class CodeFormat { int2, int3, int4, int8, lut2, lut3, lut4, e4m3, trellis, progressive4 };
enum class Activations { f16, bf16 };

// A weight in the container (docs/gpu.md), on the device, and what the GEMM adds.
struct GemmWeight {
    CodeFormat format;
    Activations type; // of x with 16 bits and of y
    int rows, columns;
    const void* codes;
    const void* scale;       // fp16 [groups][padded rows]
    const void* zero_point;  // uint8 [groups][padded rows], or null: symmetric
    const void* group_scale; // uint8 [groups][padded rows], progressive
    const void* offset;      // uint8 [groups][padded rows], progressive
    const void* table;       // fp16 [16], of lut
    const void* bias;        // [rows] in the type of y, or null
    int group;               // columns that share a scale: 32, 64, 128 or another power of two, or 0 for the whole row
    int row_bits, window;    // of the trellis
};

// What a call with up to so many tokens needs. Made once: it asks the device, which takes microseconds.
struct GemmPlan {
    int shape;          // which of the kernels
    int shares, stages; // blocks, steps under way
    int shared_bytes;
    bool whole;         // output tiles are not split: a token's result does not depend on how many there are
    int64_t part_words; // of workspace
    int64_t counters;   // words of workspace, zero before the first call and left zero
};

// Tokens, and where they are. 16 bits: x in the weight's type. 8 bits: int8, columns 0, 2, 1, 3 of every four, with
// scales and sums. Rows on 16 bytes, with 16-byte strides; x_bytes are read of a row, a multiple of 16.
struct GemmTokens {
    const void* x;
    int64_t x_stride; // bytes
    int x_bytes;
    const float* scale; // [tokens]
    const int32_t* sum; // [tokens]
    int tokens;
    void* y;
    int64_t y_stride; // elements
};

// shares, shared_limit: 0 for what the current device holds. 0 or a cudaError_t.
int plan_gemm_w4a16(const GemmWeight& weight, int tokens, bool batch_invariant, int shares, int shared_limit,
                    GemmPlan* plan);
int plan_gemm_w4a8(const GemmWeight& weight, int tokens, bool batch_invariant, int shares, int shared_limit,
                   GemmPlan* plan);

// y = x W^T + bias. parts, counters: workspace of the plan's size, of this stream alone. The plan may be of more
// tokens. 0 or a cudaError_t; nothing is allocated, nothing waited for.
int gemm_w4a16(const GemmWeight& weight, const GemmPlan& plan, const GemmTokens& tokens, void* parts, void* counters,
               void* stream);
int gemm_w4a8(const GemmWeight& weight, const GemmPlan& plan, const GemmTokens& tokens, void* parts, void* counters,
              void* stream);

} // namespace bitpalette
