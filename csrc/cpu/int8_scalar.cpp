// The int8 kernel without special instructions.
#include "int8_body.h"

namespace bitpalette {
const Int8Rows int8_scalar = int8_rows;
} // namespace bitpalette
