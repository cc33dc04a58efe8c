// Reading for AVX-512.
#include "bandwidth_body.h"

#if BITPALETTE_X86
namespace bitpalette {
namespace {

struct Avx512 {
    using Reg = uint64_t __attribute__((vector_size(64)));
};

} // namespace

const ReadBytes read_bytes_avx512 = read_all<Avx512>;
} // namespace bitpalette
#endif
