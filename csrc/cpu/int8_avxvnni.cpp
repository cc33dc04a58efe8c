// The kernel for bytes in canonical layout for AVX2 with AVX-VNNI.
#include "int8_body.h"

#if BITPALETTE_AVXVNNI
#include "dot_avxvnni.h"
#include "int8_lanes_avx2.h"

namespace bitpalette {
namespace {

struct AvxVnni : Avx2 {
    using Input = __m256i;

    static Input load_input(const int8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
    static Ints add_products(Ints start, Codes c, Input x) { return dot_bytes(start, c, x); }
};

} // namespace

const Int8Unit int8_avxvnni = int8_unit<AvxVnni>();

} // namespace bitpalette
#endif
