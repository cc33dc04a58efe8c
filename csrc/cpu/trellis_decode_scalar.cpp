#include "trellis_decode_body.h"

namespace bitpalette {
const TrellisDecodeUnit trellis_decode_scalar = unit;
} // namespace bitpalette

