#include "kv_append.cuh"

#include <stdexcept>
#include <string>

#include "launch.cuh"

namespace bitpalette {
namespace {

void check(const KvTokens& x) {
    const auto refuse = [](const std::string& what) { throw std::invalid_argument("tokens of a KV cache: " + what); };
    if (x.tokens < 0 || x.heads < 1 || x.width < 16 || x.width % 16 != 0 || x.width > kv_most_width)
        refuse("[" + std::to_string(x.tokens) + ", " + std::to_string(x.heads) + ", " + std::to_string(x.width) +
               "]; the last is a multiple of 16, at most " + std::to_string(kv_most_width));
    if (x.tokens * x.heads > int64_t{INT32_MAX} * kv_append_warps)
        refuse(std::to_string(x.tokens) + " of " + std::to_string(x.heads) + " heads are too many for a launch");
    const KvRotation& r = x.rotation;
    if (x.rotate && (r.odd << r.log2 != x.width || (r.odd > 1) != (r.matrix != nullptr)))
        refuse("a rotation of " + std::to_string(r.odd) + " * 2^" + std::to_string(r.log2) + " elements, " +
               (r.matrix == nullptr ? "without" : "with") + " a matrix, for a head_dim of " + std::to_string(x.width));
}

template <bool Encode>
int start(const KvAppendArgs& args, void* z, Dtype dtype, void* stream) {
    const int64_t rows = args.from.tokens * args.from.heads;
    if (rows == 0)
        return 0;
    const auto grid = static_cast<unsigned>((rows + kv_append_warps - 1) / kv_append_warps);
    const size_t room = static_cast<size_t>(kv_append_warps * kv_append_room(args.from.width));
    return launch(kv_append_kernel<Encode>, grid, 32 * kv_append_warps, room, stream, args, z, dtype);
}

} // namespace

int kv_append(const KvAppendArgs& args, void* stream) {
    check(args.from);
    if (args.bits != 2 && args.bits != 3 && args.bits != 4 && args.bits != 8)
        throw std::invalid_argument("tokens of a KV cache: " + std::to_string(args.bits) +
                                    " bits; 2, 3, 4 and 8 have a kernel");
    if (reinterpret_cast<uintptr_t>(args.codes) % 16 != 0)
        throw std::invalid_argument("tokens of a KV cache: codes are not aligned to 16 bytes");
    return start<true>(args, nullptr, Dtype::f32, stream);
}

int kv_rotate(const KvRotateArgs& args, void* stream) {
    check(args.from);
    KvAppendArgs from = {};
    from.from = args.from;
    return start<false>(from, args.z, args.dtype, stream);
}

} // namespace bitpalette
