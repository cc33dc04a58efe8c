#include "gemv_i8.cuh"

#include <stdexcept>
#include <string>
#include <type_traits>

#include "container_checks.h"
#include "launch.cuh"

namespace bitpalette {
namespace {

void check(const GemvI8Args& args) {
    const auto refuse = [](const std::string& what) { throw std::invalid_argument(what); };
    check_container(args.weight);
    if (args.weight.format != Format::trellis)
        refuse("gemv_i8 multiplies by trellis weights; this one has format " +
               std::to_string(static_cast<int>(args.weight.format)));
    if (args.tokens < 1 || args.tokens > gemv_most_tokens || args.weight.k > gemv_most_columns)
        refuse(std::to_string(args.tokens) + " tokens of " + std::to_string(args.weight.k) +
               " columns; 1 or 2 tokens of at most " + std::to_string(gemv_most_columns));
    if (args.blocks < 1 || args.workspace == nullptr)
        refuse(std::to_string(args.blocks) + " blocks; at least 1, with a workspace");
    if (args.y_stride < args.weight.n)
        refuse("rows of " + std::to_string(args.weight.n) + " outputs, " + std::to_string(args.y_stride) +
               " elements apart");
}

template <int TileWords, int Tokens, bool Planes>
int start(const GemvI8Args& args, void* stream) {
    const int words = (args.weight.row_bits + 1) / 2;
    // no empty runs: a row would wait for a block that has nothing of it
    const int64_t superblocks =
        (args.weight.n + superblock - 1) / superblock * ((args.weight.k + superblock - 1) / superblock);
    const int64_t blocks = superblocks < args.blocks ? superblocks : args.blocks;
    const size_t shared = gemv_shared_bytes(words, Tokens * (Planes ? 2 : 1));
    return launch(gemv_i8_kernel<TileWords, Tokens, Planes>, static_cast<unsigned>(blocks), gemv_threads, shared,
                  stream, args);
}

template <int TileWords>
int start(const GemvI8Args& args, void* stream) {
    if (args.tokens == 1)
        return args.x_low == nullptr ? start<TileWords, 1, false>(args, stream)
                                     : start<TileWords, 1, true>(args, stream);
    return args.x_low == nullptr ? start<TileWords, 2, false>(args, stream) : start<TileWords, 2, true>(args, stream);
}

} // namespace

int gemv_i8(const GemvI8Args& args, void* stream) {
    check(args);
    switch ((args.weight.row_bits + 1) / 2) {
    case 16: // 2 bits
        return start<16>(args, stream);
    case 20: // 2.5
        return start<20>(args, stream);
    case 24: // 3
        return start<24>(args, stream);
    case 28: // 3.5
        return start<28>(args, stream);
    case 32: // 4
        return start<32>(args, stream);
    default:
        return start<0>(args, stream);
    }
}

} // namespace bitpalette
