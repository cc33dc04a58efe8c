// Reading for NEON.
#include "bandwidth_body.h"

#if BITPALETTE_AARCH64
namespace bitpalette {
namespace {

struct Neon {
    using Reg = uint64_t __attribute__((vector_size(16)));
};

} // namespace

const ReadBytes read_bytes_neon = read_all<Neon>;
} // namespace bitpalette
#endif
