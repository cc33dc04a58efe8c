#include "isa.h"

namespace bitpalette {

const char* isa_name(Isa isa) {
    constexpr const char* names[isa_count] = {"scalar", "avx2", "avx512", "avx512vbmi"};
    return names[static_cast<int>(isa)];
}

bool isa_available(Isa isa) {
    if (isa == Isa::scalar)
        return true;
#if BITPALETTE_X86 && (defined(__GNUC__) || defined(__clang__))
    __builtin_cpu_init(); // its answers include the operating system's part (XGETBV)
    if (isa == Isa::avx2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (isa == Isa::avx512vbmi)
        return isa_available(Isa::avx512) && __builtin_cpu_supports("avx512vbmi");
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
#else
    return false;
#endif
}

} // namespace bitpalette
