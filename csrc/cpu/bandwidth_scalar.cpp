// Reading without special instructions, 64 bits at a time.
#include "bandwidth_body.h"

namespace bitpalette {
namespace {

struct Scalar {
    using Reg = uint64_t;
};

} // namespace

const ReadBytes read_bytes_scalar = read_all<Scalar>;
} // namespace bitpalette
