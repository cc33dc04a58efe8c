#include "trellis_decode_body.h"

#if BITPALETTE_X86
namespace bitpalette {
const TrellisDecodeUnit trellis_decode_avx2 = unit;
} // namespace bitpalette
#endif
