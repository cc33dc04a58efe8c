// Which instruction sets this build has code for and this machine can run.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#define BITPALETTE_X86 1
#else
#define BITPALETTE_X86 0
#endif

// Compilers that know AVX-VNNI, GCC from 11 and Clang from 12 on, have this header.
#if BITPALETTE_X86 && defined(__has_include)
#if __has_include(<avxvnniintrin.h>)
#define BITPALETTE_AVXVNNI 1
#endif
#endif
#ifndef BITPALETTE_AVXVNNI
#define BITPALETTE_AVXVNNI 0
#endif

#if defined(__aarch64__) && !defined(__AARCH64EB__)
#define BITPALETTE_AARCH64 1
#else
#define BITPALETTE_AARCH64 0
#endif

namespace bitpalette {

// Of one architecture the slowest first. neon includes the dot product, which came with Armv8.2.
enum class Isa { scalar = 0, avx2 = 1, avxvnni = 2, avx512 = 3, avx512vbmi = 4, neon = 5 };

constexpr int isa_count = 6;

// The set whose code serves where this one, which adds to it, has none of its own.
constexpr Isa plain_isa(Isa isa) {
    return isa == Isa::avxvnni ? Isa::avx2 : isa == Isa::avx512vbmi ? Isa::avx512 : isa;
}

const char* isa_name(Isa isa);

// Both compiled in and supported by the CPU and the operating system. scalar always is.
bool isa_available(Isa isa);

} // namespace bitpalette
