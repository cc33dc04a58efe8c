// The code-plane kernel for AVX2 with AVX-VNNI.
#include "codes_body.h"

#if BITPALETTE_AVXVNNI
#include "codes_lanes_avx2.h"
#include "dot_avxvnni.h"

namespace bitpalette {
namespace {

struct AvxVnni : Avx2 {
    using Dot = Ints;

    static Dot start(Ints i) { return i; }
    template <int top, int k>
    static void add_products(Dot& d, Codes c, const int8_t* input) {
        int32_t four;
        std::memcpy(&four, input, sizeof four);
        const __m256i x = _mm256_set1_epi32(four);
        d = {dot_bytes(d.a, c.a, x), dot_bytes(d.b, c.b, x)};
    }
    static Ints finish(Dot d) { return d; }
};

} // namespace

CodesFunctions codes_avxvnni(const CodesView& w, InputForm form) {
    return choose_functions<AvxVnni>(w, form);
}

} // namespace bitpalette
#endif
