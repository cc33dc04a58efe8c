// The panel kernel for AVX2 with AVX-VNNI, whose products of bytes do not saturate.
#include "panel_gemm_body.h"

#if BITPALETTE_AVXVNNI
#include "dot_avxvnni.h"
#include "panel_gemm_lanes_avx2.h"

namespace bitpalette {
namespace {

struct AvxVnni : Avx2 {
    static constexpr int top_byte = 255, chain = 1;

    static void add_products(Ints& sum, Ints w, Ints x, Bytes) { sum = dot_bytes(sum, w, x); }
    static void add_products(Ints& sum, Ints w, Ints x, Shorts) { sum = dot_shorts(sum, w, x); }
};

} // namespace

const PanelUnit panel_avxvnni = panel_of<AvxVnni>();

} // namespace bitpalette
#endif
