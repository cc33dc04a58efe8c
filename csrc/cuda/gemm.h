// The launchers of the GEMMs: which kernel, how many blocks, how much memory; then the launch.
#pragma once

#include "container.cuh"

namespace bitpalette {

// A weight and what the GEMM adds. Its groups are of 32, 64, 128 or another power of two, or of all columns.
struct GemmWeight {
    Container weight;
    Dtype type;       // fp16 or bf16: of x with 16 bits and of y
    const void* bias; // [n] in the type of y, or null
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
