// The trellis kernel for AVX2 with AVX-VNNI.
#include "trellis_linear_body.h"

#if BITPALETTE_AVXVNNI
#include "dot_avxvnni.h"
#include "trellis_linear_lanes_avx2.h"

namespace bitpalette {
namespace {

struct AvxVnni : Avx2 {
    static constexpr bool byte_products = true;

    static Ints zero() { return _mm256_setzero_si256(); }
    static Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
    static Ints add_products(Ints sum, Ints a, Ints b) { return dot_shorts(sum, a, b); }
    static Ints add_byte_products(Ints sum, Ints a, Ints b) { return dot_bytes(sum, a, b); }
};

} // namespace

const TrellisLinearUnit trellis_linear_avxvnni{multiply<AvxVnni>, decode<AvxVnni>, unpack<AvxVnni>};

} // namespace bitpalette
#endif
