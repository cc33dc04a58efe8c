#include "transform_input.cuh"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "dispatch.cuh"
#include "launch.cuh"

namespace bitpalette {
namespace {

void check(const TransformInputArgs& args, int odd) {
    const auto refuse = [](const std::string& what) { throw std::invalid_argument(what); };
    if (args.n < 1 || args.tokens < 0 || args.tokens > INT32_MAX)
        refuse(std::to_string(args.tokens) + " tokens of " + std::to_string(args.n) +
               " columns; 1 column or more, 0 to 2^31 - 1 tokens");
    if (args.x_stride < args.n || args.stride < args.n || args.stride % transform_columns != 0)
        refuse("rows of " + std::to_string(args.n) + " columns, " + std::to_string(args.x_stride) +
               " elements apart and written " + std::to_string(args.stride) + " apart; that is a multiple of 64");
    if (args.rotate && odd > transform_most_odd)
        refuse("a rotation of " + std::to_string(args.n) + " columns has the odd part " + std::to_string(odd) +
               "; at most " + std::to_string(transform_most_odd) + ", torch's FFT is for those");
    if (args.rotate && odd > 1 && args.hartley == nullptr)
        refuse("a rotation of " + std::to_string(args.n) + " columns needs the matrix of its odd part " +
               std::to_string(odd));
    if (reinterpret_cast<uintptr_t>(args.y) % 16 != 0 || reinterpret_cast<uintptr_t>(args.hartley) % 16 != 0)
        refuse("the output or the matrix of the rotation is not aligned to 16 bytes");
    if (args.output != TransformOutput::same && (args.scale == nullptr || args.sum == nullptr))
        refuse("an int8 output without scale or sum");
    if (args.output == TransformOutput::planes &&
        (args.low == nullptr || reinterpret_cast<uintptr_t>(args.low) % 16 != 0))
        refuse("an output of two planes without `low`, aligned to 16 bytes");
}

// Sixteen columns a thread in the passes, and in the Hartley part one sweep over the columns where that is possible.
int block_threads(int n, int odd, bool rotate) {
    int items = (n + 15) / 16;
    if (rotate && odd > 1) {
        const int rows = odd <= 4 ? 4 : odd <= 8 ? 8 : 16;
        items = std::max(items, n / odd * ((odd + rows - 1) / rows));
    }
    return std::clamp((items + 31) / 32 * 32, 64, transform_most_threads);
}

} // namespace

int transform_input(const TransformInputArgs& args, void* stream) {
    int log2 = 0;
    while (args.n > 0 && args.n >> log2 << log2 == args.n)
        ++log2;
    log2 = log2 > 0 ? log2 - 1 : 0; // the largest power of two that divides n
    const int odd = args.n >> log2;
    check(args, odd);
    if (args.tokens == 0)
        return 0;
    const size_t reduce = transform_reduce_words * sizeof(uint32_t);
    const size_t row = static_cast<size_t>(transform_input_room(args.n)) * sizeof(float);
    const bool shared = reduce + row <= args.shared_limit;
    if (!shared && args.workspace == nullptr)
        throw std::invalid_argument("a row of " + std::to_string(args.n) + " columns takes " +
                                    std::to_string(reduce + row) + " bytes, shared memory has " +
                                    std::to_string(args.shared_limit) + ": give a workspace");
    const unsigned grid = static_cast<unsigned>(args.tokens);
    const unsigned threads = static_cast<unsigned>(block_threads(args.n, odd, args.rotate));
    return with_dtype(args.dtype, [&](auto type) {
        if (shared)
            return launch(transform_input_kernel<type(), true>, grid, threads, reduce + row, stream, args, threads, odd,
                          log2);
        return launch(transform_input_kernel<type(), false>, grid, threads, reduce, stream, args, threads, odd, log2);
    });
}

} // namespace bitpalette
