// The trellis kernel for AVX2 and FMA: a register is a row of a tile.
#include "trellis_linear_body.h"

#if BITPALETTE_X86
#include "trellis_linear_lanes_avx2.h"

namespace bitpalette {

const TrellisLinearUnit trellis_linear_avx2{multiply<Avx2>, decode<Avx2>, unpack<Avx2>};

} // namespace bitpalette
#endif
