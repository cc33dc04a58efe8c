// Reading for AVX2.
#include "bandwidth_body.h"

#if BITPALETTE_X86
namespace bitpalette {
namespace {

struct Avx2 {
    using Reg = uint64_t __attribute__((vector_size(32)));
};

} // namespace

const ReadBytes read_bytes_avx2 = read_all<Avx2>;
} // namespace bitpalette
#endif
