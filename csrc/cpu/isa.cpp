#include "isa.h"

#if BITPALETTE_X86 && (defined(__GNUC__) || defined(__clang__))
#include <cpuid.h>
#elif BITPALETTE_AARCH64 && defined(__linux__)
#include <sys/auxv.h>
#elif BITPALETTE_AARCH64 && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace bitpalette {
namespace {

#if BITPALETTE_X86 && (defined(__GNUC__) || defined(__clang__))

#if !BITPALETTE_AVXVNNI
bool has_avxvnni() {
    return false;
}
#elif defined(BITPALETTE_AVXVNNI_IS_AVX512)
// A build for tests, with AVX-512's encoding of the same instructions: processors with AVX-VNNI are rarer.
bool has_avxvnni() {
    return __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
#else
// CPUID leaf 7, subleaf 1, EAX bit 4. Its registers are AVX2's, so what the system saves is what that asks for.
bool has_avxvnni() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 4 & 1) != 0;
}
#endif

bool has(Isa isa) {
    __builtin_cpu_init(); // its answers include the operating system's part (XGETBV)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (isa == Isa::avx2)
        return avx2;
    if (isa == Isa::avxvnni)
        return avx2 && has_avxvnni();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512vnni");
    if (isa == Isa::avx512vbmi)
        return avx512 && __builtin_cpu_supports("avx512vbmi");
    return isa == Isa::avx512 && avx512;
}

#elif BITPALETTE_AARCH64 && defined(__linux__)

bool has(Isa isa) {
    constexpr unsigned long dot_product = 1ul << 20; // HWCAP_ASIMDDP, which old headers lack
    return isa == Isa::neon && (getauxval(AT_HWCAP) & dot_product) != 0;
}

#elif BITPALETTE_AARCH64 && defined(__APPLE__)

bool has(Isa isa) {
    int found = 0;
    size_t size = sizeof found;
    return isa == Isa::neon && sysctlbyname("hw.optional.arm.FEAT_DotProd", &found, &size, nullptr, 0) == 0 &&
           found != 0;
}

#else

bool has(Isa) {
    return false;
}

#endif

} // namespace

const char* isa_name(Isa isa) {
    constexpr const char* names[isa_count] = {"scalar", "avx2", "avxvnni", "avx512", "avx512vbmi", "neon"};
    return names[static_cast<int>(isa)];
}

bool isa_available(Isa isa) {
    return isa == Isa::scalar || has(isa);
}

} // namespace bitpalette
