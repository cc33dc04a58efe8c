// The code-plane kernel for AVX2, FMA and F16C: 16 lanes are two registers.
#include "codes_body.h"

#if BITPALETTE_X86
#include "codes_lanes_avx2.h"

namespace bitpalette {

CodesFunctions codes_avx2(const CodesView& w, InputForm form) {
    return choose_functions<Avx2>(w, form);
}

} // namespace bitpalette
#endif
