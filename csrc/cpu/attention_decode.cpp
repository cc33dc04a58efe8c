#include "attention_decode.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "parallel.h"

namespace bitpalette {
namespace {

// Below this many bytes of keys and values a thread, waking another thread (about 2 us) costs more than it saves.
constexpr int64_t bytes_per_thread = 64 << 10;

const AttentionUnit& unit_of(Isa isa) {
    if (!isa_available(isa))
        throw std::invalid_argument(std::string("this machine has no ") + isa_name(isa));
#if BITPALETTE_X86
    if (plain_isa(isa) == Isa::avx512)
        return attention_avx512;
    if (plain_isa(isa) == Isa::avx2)
        return attention_avx2;
#endif
#if BITPALETTE_AARCH64
    if (isa == Isa::neon)
        return attention_neon;
#endif
    return attention_scalar;
}

} // namespace

void attend(Isa isa, const AttentionCall& call, int threads) {
    struct Context {
        const AttentionUnit& unit;
        const AttentionCall& call;
    } context{unit_of(isa), call};
    const int64_t last = call.first + call.tokens;
    const int64_t seen = call.window > 0 ? std::min(call.window + call.tokens, last) : last;
    const int64_t bytes = 2 * seen * call.row * (call.dtype == Dtype::f32 ? 4 : 2) * call.heads * call.tokens;
    const auto body = [](void* data, int64_t begin, int64_t end) {
        const Context& c = *static_cast<const Context*>(data);
        c.unit.attend(c.call, begin, end);
    };
    const int64_t worth = std::clamp<int64_t>(bytes / bytes_per_thread, 1, std::max(threads, 1));
    parallel_for(call.heads, static_cast<int>(worth), body, &context);
}

} // namespace bitpalette
