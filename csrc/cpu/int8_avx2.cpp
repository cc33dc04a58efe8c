// The int8 kernel for AVX2.
#include "int8_body.h"

#if BITPALETTE_X86
namespace bitpalette {
const Int8Rows int8_avx2 = int8_rows;
} // namespace bitpalette
#endif
