// The int8 kernel for AVX-512.
#include "int8_body.h"

#if BITPALETTE_X86
namespace bitpalette {
const Int8Rows int8_avx512 = int8_rows;
} // namespace bitpalette
#endif
