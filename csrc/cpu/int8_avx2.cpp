// The kernel for bytes in canonical layout for AVX2.
#include "int8_body.h"

#if BITPALETTE_X86
#include "int8_lanes_avx2.h"

namespace bitpalette {

const Int8Unit int8_avx2 = int8_unit<Avx2>();

} // namespace bitpalette
#endif
