#include "container_entry.h"
#include "dequantize.cuh"
#include "embedding.cuh"

extern "C" int run_dequantize(CONTAINER_PARAMETERS, void* out, int64_t stride, int dtype) {
    const bitpalette::DequantizeArgs args{CONTAINER, out, stride, static_cast<bitpalette::Dtype>(dtype)};
    return bitpalette::call_launcher(bitpalette::dequantize, args);
}

extern "C" int run_embedding(CONTAINER_PARAMETERS, const int64_t* index, void* out, int64_t rows, int64_t stride,
                             int dtype) {
    const bitpalette::EmbeddingArgs args{CONTAINER, index, out, rows, stride, static_cast<bitpalette::Dtype>(dtype)};
    return bitpalette::call_launcher(bitpalette::embedding, args);
}
