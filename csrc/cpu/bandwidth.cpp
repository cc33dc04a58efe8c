#include "bandwidth.h"

#include <atomic>
#include <stdexcept>
#include <string>

#include "parallel.h"

namespace bitpalette {
namespace {

constexpr int64_t block = 4096; // shares are whole pages: no word is split between threads

ReadBytes reader_of(Isa isa) {
#if BITPALETTE_X86
    if (plain_isa(isa) == Isa::avx512)
        return read_bytes_avx512;
    if (plain_isa(isa) == Isa::avx2)
        return read_bytes_avx2;
#endif
#if BITPALETTE_AARCH64
    if (isa == Isa::neon)
        return read_bytes_neon;
#endif
    (void)isa;
    return read_bytes_scalar;
}

} // namespace

uint64_t read_bytes(Isa isa, const uint8_t* from, int64_t bytes, int threads) {
    if (!isa_available(isa))
        throw std::invalid_argument(std::string("this machine has no ") + isa_name(isa));
    if (bytes < 0)
        throw std::invalid_argument("read_bytes: " + std::to_string(bytes) + " bytes");
    struct Call {
        ReadBytes read;
        const uint8_t* from;
        int64_t bytes;
        std::atomic<uint64_t> total;
    } call{reader_of(isa), from, bytes, {0}};
    parallel_for((bytes + block - 1) / block, threads,
                 [](void* context, int64_t begin, int64_t end) {
                     Call& c = *static_cast<Call*>(context);
                     const int64_t stop = end * block < c.bytes ? end * block : c.bytes;
                     c.total.fetch_xor(c.read(c.from + begin * block, stop - begin * block));
                 },
                 &call);
    return call.total.load();
}

} // namespace bitpalette
