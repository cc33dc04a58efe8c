// Unquantized weights for AVX-512.
#include "dense_weight_body.h"

#if BITPALETTE_X86
#include "float_lanes_avx512.h"

namespace bitpalette {
const DenseUnit dense_avx512 = dense_unit<Avx512>;
} // namespace bitpalette
#endif
