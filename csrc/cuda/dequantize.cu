#include "dequantize.cuh"

#include "container_checks.cuh"
#include "dispatch.cuh"
#include "launch.cuh"

namespace bitpalette {

int dequantize(const DequantizeArgs& args, void* stream) {
    const Container& w = args.weight;
    check_container(w);
    if (args.stride < w.k)
        throw std::invalid_argument("rows of " + std::to_string(w.k) + " columns, " + std::to_string(args.stride) +
                                    " elements apart");
    const int64_t superblocks = (w.n + superblock - 1) / superblock * ((w.k + superblock - 1) / superblock);
    const int64_t warps = superblocks * (superblock / tile_side);
    static_assert(superblock / tile_side * 2 * 32 == dequantize_threads, "whole superblocks, two to a block");
    const unsigned grid = static_cast<unsigned>((warps + dequantize_threads / 32 - 1) / (dequantize_threads / 32));
    return with_format(w.format, [&](auto format) {
        return with_dtype(args.dtype, [&](auto dtype) {
            return launch(dequantize_kernel<format(), dtype()>, grid, dequantize_threads, 0, stream, args);
        });
    });
}

} // namespace bitpalette
