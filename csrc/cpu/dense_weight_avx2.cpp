// Unquantized weights for AVX2.
#include "dense_weight_body.h"

#if BITPALETTE_X86
#include "float_lanes_avx2.h"

namespace bitpalette {
const DenseUnit dense_avx2 = dense_unit<Avx2>;
} // namespace bitpalette
#endif
