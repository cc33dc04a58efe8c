// The panel kernel for AVX2 and FMA: a block of 16 rows times 6 tokens takes 12 of 16 registers.
#include "panel_gemm_body.h"

#if BITPALETTE_X86
#include "panel_gemm_lanes_avx2.h"

namespace bitpalette {

const PanelUnit panel_avx2 = panel_of<Avx2>();

} // namespace bitpalette
#endif
