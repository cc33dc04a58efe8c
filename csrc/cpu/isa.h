// Which instruction sets this build has code for and this machine can run.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#define BITPALETTE_X86 1
#else
#define BITPALETTE_X86 0
#endif

namespace bitpalette {

enum class Isa { scalar = 0, avx2 = 1, avx512 = 2, avx512vbmi = 3 }; // slowest first

constexpr int isa_count = 4;

const char* isa_name(Isa isa);

// Both compiled in and supported by the CPU and the operating system. scalar always is.
bool isa_available(Isa isa);

} // namespace bitpalette
