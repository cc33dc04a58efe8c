// What a decoder computes between its linear layers, for AVX-512.
#include "vector_math_body.h"

#if BITPALETTE_X86
#include "float_lanes_avx512.h"

namespace bitpalette {
const VectorMath vector_math_avx512 = vector_math_unit<Avx512>;
} // namespace bitpalette
#endif
