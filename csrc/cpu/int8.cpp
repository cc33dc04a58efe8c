#include "int8.h"

#include <stdexcept>
#include <string>
#include <vector>

#include "parallel.h"

namespace bitpalette {
namespace {

// Below this many bytes of codes a thread, waking another thread (about 2 us) costs more than it saves.
constexpr int64_t bytes_per_thread = 64 << 10;

Int8Rows rows_of(Isa isa) {
#if BITPALETTE_X86
    if (isa == Isa::avx512)
        return int8_avx512;
    if (isa == Isa::avx2)
        return int8_avx2;
#endif
    return int8_scalar;
}

} // namespace

void int8_linear(Isa isa, const Int8Weight& w, const float* x, int64_t tokens, float* y, int threads) {
    if (!isa_available(isa))
        throw std::invalid_argument(std::string("this machine has no ") + isa_name(isa));
    if (w.out < 1 || w.in < 1)
        throw std::invalid_argument("int8: a weight [" + std::to_string(w.out) + ", " + std::to_string(w.in) + "]");
    struct Call {
        Int8Rows rows;
        const Int8Weight& w;
        const float* x;
        int64_t tokens;
        float* y;
    } call{rows_of(isa), w, x, tokens, y};
    const int64_t useful = w.out * w.in * (tokens < 1 ? 1 : tokens) / bytes_per_thread;
    parallel_for(
        w.out,
        static_cast<int>(useful < 1         ? 1
                         : useful < threads ? useful
                                            : threads),
        [](void* context, int64_t begin, int64_t end) {
            const Call& c = *static_cast<Call*>(context);
            thread_local std::vector<float> row; // kept between calls
            row.resize(static_cast<size_t>(c.w.in));
            c.rows(c.w, c.x, c.tokens, c.y, begin, end, row.data());
        },
        &call);
}

} // namespace bitpalette
