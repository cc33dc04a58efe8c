// What a decoder computes between its linear layers, for AVX2.
#include "vector_math_body.h"

#if BITPALETTE_X86
#include "float_lanes_avx2.h"

namespace bitpalette {
const VectorMath vector_math_avx2 = vector_math_unit<Avx2>;
} // namespace bitpalette
#endif
