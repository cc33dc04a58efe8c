// Which instruction sets this build has code for and this machine can run.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#define BITPALETTE_X86 1
#else
#define BITPALETTE_X86 0
#endif

#if defined(__aarch64__) && !defined(__AARCH64EB__)
#define BITPALETTE_AARCH64 1
#else
#define BITPALETTE_AARCH64 0
#endif

namespace bitpalette {

// Of one architecture the slowest first. neon includes the dot product, which came with Armv8.2.
enum class Isa { scalar = 0, avx2 = 1, avx512 = 2, avx512vbmi = 3, neon = 4 };

constexpr int isa_count = 5;

const char* isa_name(Isa isa);

// Both compiled in and supported by the CPU and the operating system. scalar always is.
bool isa_available(Isa isa);

} // namespace bitpalette
