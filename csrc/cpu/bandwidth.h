// How fast memory can be read: the limit that `quantize bench kernels` holds every kernel against.
#pragma once

#include <cstdint>

#include "isa.h"

namespace bitpalette {

// One instruction set's translation unit: exclusive or of all whole 64-bit words among the `bytes` from `from` on.
// A result that depends on every byte keeps the loads in the program.
using ReadBytes = uint64_t (*)(const uint8_t* from, int64_t bytes);

extern const ReadBytes read_bytes_scalar;
#if BITPALETTE_X86
extern const ReadBytes read_bytes_avx2;
extern const ReadBytes read_bytes_avx512;
#endif
#if BITPALETTE_AARCH64
extern const ReadBytes read_bytes_neon;
#endif

// Reads `bytes` from `from` on, a contiguous share for each of up to `threads` threads; the exclusive or of the shares'
// results, so of all whole 64-bit words. std::invalid_argument for an instruction set that this machine lacks.
uint64_t read_bytes(Isa isa, const uint8_t* from, int64_t bytes, int threads);

} // namespace bitpalette
