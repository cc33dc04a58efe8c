#include "embedding.cuh"

#include "container_checks.cuh"
#include "dispatch.cuh"
#include "launch.cuh"

namespace bitpalette {

int embedding(const EmbeddingArgs& args, void* stream) {
    const Container& w = args.weight;
    check_container(w);
    if (args.stride < w.k)
        throw std::invalid_argument("rows of " + std::to_string(w.k) + " columns, " + std::to_string(args.stride) +
                                    " elements apart");
    const int64_t grid = args.rows * embedding_blocks(w.k);
    if (args.rows < 0 || grid > INT32_MAX)
        throw std::invalid_argument(std::to_string(args.rows) + " rows of " + std::to_string(w.k) +
                                    " columns; 0 rows or more, in at most 2^31 - 1 blocks of " +
                                    std::to_string(4 * embedding_threads) + " columns: look up fewer at a time");
    if (args.rows == 0)
        return 0;
    return with_format(w.format, [&](auto format) {
        return with_dtype(args.dtype, [&](auto dtype) {
            return launch(embedding_kernel<format(), dtype()>, static_cast<unsigned>(grid), embedding_threads, 0,
                          stream, args);
        });
    });
}

} // namespace bitpalette
