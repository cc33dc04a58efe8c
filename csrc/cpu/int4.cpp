#include "int4.h"

#include <stdexcept>
#include <string>
#include <vector>

#include "parallel.h"

namespace bitpalette {
namespace {

// Below this many bytes of codes a thread, waking another thread (about 2 us) costs more than it saves.
constexpr int64_t bytes_per_thread = 64 << 10;

const Int4Ops& ops(Isa isa) {
#if BITPALETTE_X86
    if (isa == Isa::avx512)
        return int4_avx512;
    if (isa == Isa::avx2)
        return int4_avx2;
#endif
    return int4_scalar;
}

int useful_threads(int64_t bytes, int threads) {
    const int64_t useful = bytes / bytes_per_thread;
    return static_cast<int>(useful < 1 ? 1 : useful < threads ? useful : threads);
}

} // namespace

void int4_check(Isa isa, const Int4Weight& w) {
    if (!isa_available(isa))
        throw std::invalid_argument(std::string("this machine has no ") + isa_name(isa));
    if (w.out < 1 || w.in < 1)
        throw std::invalid_argument("int4: a weight [" + std::to_string(w.out) + ", " + std::to_string(w.in) + "]");
    if (w.group_size < 0 || w.group_size % int4_tile_columns != 0)
        throw std::invalid_argument("int4: group_size " + std::to_string(w.group_size) + " is no multiple of 32");
}

void int4_linear(Isa isa, const Int4Weight& w, const void* x, const void* bias, void* y, Dtype dtype, int64_t tokens,
                 int threads) {
    const int64_t tiles = w.tiles();
    // kept by the thread between calls: a decode step makes hundreds of calls of a few sizes
    thread_local std::vector<int8_t> codes;
    thread_local std::vector<float> scale;
    thread_local std::vector<int32_t> negative_sum;
    codes.resize(static_cast<size_t>(tokens * tiles * int4_tile_columns));
    scale.resize(static_cast<size_t>(tokens * tiles));
    negative_sum.resize(static_cast<size_t>(tokens * tiles));
    struct Call {
        const Int4Ops& ops;
        const Int4Weight& w;
        Int8Input x;
        int64_t tokens;
        const void* bias;
        void* y;
        Dtype dtype;
    } call{ops(isa), w, {codes.data(), scale.data(), negative_sum.data()}, tokens, bias, y, dtype};
    call.ops.quantize(w, x, dtype, tokens, call.x);
    const auto body = [](void* context, int64_t begin, int64_t end) {
        const Call& c = *static_cast<const Call*>(context);
        c.ops.linear(c.w, c.x, c.tokens, c.bias, c.y, c.dtype, begin, end);
    };
    parallel_for(w.blocks(), useful_threads(w.blocks() * tiles * int4_tile_bytes, threads), body, &call);
}

void int4_rows(Isa isa, const Int4Weight& w, const int64_t* index, int64_t n, float* out, int threads) {
    for (int64_t i = 0; i < n; ++i)
        if (index[i] < 0 || index[i] >= w.out)
            throw std::invalid_argument("int4: row " + std::to_string(index[i]) + " of " + std::to_string(w.out));
    struct Call {
        const Int4Ops& ops;
        const Int4Weight& w;
        const int64_t* index;
        float* out;
    } call{ops(isa), w, index, out};
    const auto body = [](void* context, int64_t begin, int64_t end) {
        const Call& c = *static_cast<const Call*>(context);
        c.ops.rows(c.w, c.index, begin, end, c.out);
    };
    parallel_for(n, useful_threads(n * w.tiles() * int4_tile_columns / 2, threads), body, &call);
}

} // namespace bitpalette
