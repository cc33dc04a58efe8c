#include "gemv_i8.cuh"

#include <stdexcept>
#include <string>
#include <type_traits>

#include "container_checks.cuh"
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
    if (args.blocks < 1 || args.sums == nullptr || args.counters == nullptr)
        refuse(std::to_string(args.blocks) + " blocks; at least 1, with sums and counters");
    const void* wide[] = {args.weight.codes, args.x, args.x_low, args.sums};
    for (const void* address : wide)
        if (reinterpret_cast<uintptr_t>(address) % 16 != 0)
            refuse("codes, activations or sums not aligned to 16 bytes");
    if (args.y_stride < args.weight.n)
        refuse("rows of " + std::to_string(args.weight.n) + " outputs, " + std::to_string(args.y_stride) +
               " elements apart");
}

template <int TileWords, int Vectors>
int start(const GemvI8Args& args, void* stream) {
    // no empty runs: a row would wait for a block that has nothing of it
    const int64_t superblocks =
        (args.weight.n + superblock - 1) / superblock * ((args.weight.k + superblock - 1) / superblock);
    const int64_t blocks = superblocks < args.blocks ? superblocks : args.blocks;
    return launch(gemv_i8_kernel<TileWords, Vectors>, static_cast<unsigned>(blocks), gemv_threads,
                  gemv_shared_bytes(gemv_tile_words(args.weight.row_bits), Vectors), stream, args);
}

template <int TileWords, int Vectors>
int resident(int row_bits, int* blocks) {
    return resident_blocks(gemv_i8_kernel<TileWords, Vectors>, gemv_threads,
                           gemv_shared_bytes(gemv_tile_words(row_bits), Vectors), blocks);
}

// call(words, vectors), integral constants, of the instance for a rate and a number of vectors.
template <int TileWords, class Call>
int with_vectors(int vectors, Call call) {
    using Words = std::integral_constant<int, TileWords>;
    if (vectors == 1)
        return call(Words(), std::integral_constant<int, 1>());
    if (vectors == 2)
        return call(Words(), std::integral_constant<int, 2>());
    return call(Words(), std::integral_constant<int, 4>());
}

template <class Call>
int with_instance(int row_bits, int vectors, Call call) {
    switch (gemv_tile_words(row_bits)) {
    case 16: // 2 bits
        return with_vectors<16>(vectors, call);
    case 20: // 2.5
        return with_vectors<20>(vectors, call);
    case 24: // 3
        return with_vectors<24>(vectors, call);
    case 28: // 3.5
        return with_vectors<28>(vectors, call);
    case 32: // 4
        return with_vectors<32>(vectors, call);
    default:
        return with_vectors<0>(vectors, call);
    }
}

} // namespace

int gemv_i8(const GemvI8Args& args, void* stream) {
    check(args);
    return with_instance(args.weight.row_bits, args.tokens * (args.x_low == nullptr ? 1 : 2),
                         [&](auto words, auto vectors) { return start<words(), vectors()>(args, stream); });
}

int gemv_i8_resident_blocks(int row_bits, int tokens, bool planes, int* blocks) {
    return with_instance(row_bits, tokens * (planes ? 2 : 1),
                         [&](auto words, auto vectors) { return resident<words(), vectors()>(row_bits, blocks); });
}

} // namespace bitpalette
