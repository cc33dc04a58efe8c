#include "vector_math.h"

#include <stdexcept>
#include <string>

namespace bitpalette {

const VectorMath& vector_math(Isa isa) {
    if (!isa_available(isa))
        throw std::invalid_argument(std::string("this machine has no ") + isa_name(isa));
#if BITPALETTE_X86
    if (plain_isa(isa) == Isa::avx512)
        return vector_math_avx512;
    if (plain_isa(isa) == Isa::avx2)
        return vector_math_avx2;
#endif
#if BITPALETTE_AARCH64
    if (isa == Isa::neon)
        return vector_math_neon;
#endif
    return vector_math_scalar;
}

} // namespace bitpalette
