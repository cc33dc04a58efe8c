#include "kv_rows.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "kv_append.h"

namespace bitpalette {
namespace {

constexpr int64_t page_tokens = 64;

int64_t bytes_of(Dtype dtype) {
    return dtype == Dtype::f32 ? 4 : 2;
}

// One side of one row.
struct Row {
    const KvRowsCall& call;
    const KvRowsSide& side;
    int64_t row;

    int64_t token_bytes() const { return call.heads * side.width * bytes_of(call.dtype); }
    const char* fresh(int64_t token) const {
        const int64_t index = token - call.length[row] + call.skip[row];
        return static_cast<const char*>(side.fresh) +
               (row * side.fresh_batch + index * side.fresh_token) * bytes_of(call.dtype);
    }
    char* of_ring(int64_t token) const {
        return static_cast<char*>(side.ring) + (row * call.capacity + token % call.capacity) * token_bytes();
    }
    char* of_sinks(int64_t token) const {
        return static_cast<char*>(side.sinks) + (row * call.most_sinks + token) * token_bytes();
    }

    // Tokens first..last-1, `x` the first of them and the others `stride` elements apart.
    void encode(Isa isa, const void* x, int64_t stride, int64_t first, int64_t last, bool unbiased,
                std::vector<int64_t>& slots, int threads) const {
        slots.clear();
        for (int64_t token = first; token < last; ++token) {
            const int64_t place = token - call.most_sinks, page = place / page_tokens;
            if (place < 0 || page >= call.table_row)
                throw std::invalid_argument("kv rows: token " + std::to_string(token) + " of row " +
                                            std::to_string(row) + " has no page in a table of " +
                                            std::to_string(call.table_row));
            slots.push_back(call.block_table[row * call.table_row + page] * page_tokens + place % page_tokens);
        }
        const KvTokens tokens{x, call.dtype, stride, side.width, last - first, call.heads, side.width, nullptr, false};
        append_tokens(isa, tokens, {side.codes, side.gain, call.pages, side.bits, unbiased, slots.data()}, threads);
    }

    void encode_leaving(Isa isa, bool unbiased, std::vector<int64_t>& slots, int threads) const {
        const int64_t last = call.until[row], held = std::min(last, call.length[row]);
        int64_t token = call.quantized[row];
        while (token < held) {
            const int64_t n = std::min(held - token, call.capacity - token % call.capacity);
            encode(isa, of_ring(token), call.heads * side.width, token, token + n, unbiased, slots, threads);
            token += n;
        }
        if (token < last)
            encode(isa, fresh(token), side.fresh_token, token, last, unbiased, slots, threads);
    }

    void keep_new() const {
        const int64_t before = call.length[row], after = call.length_after[row];
        const auto size = static_cast<size_t>(token_bytes());
        for (int64_t t = before; t < std::min(after, call.most_sinks); ++t)
            std::memcpy(of_sinks(t), fresh(t), size);
        if (call.capacity > 0)
            for (int64_t t = std::max(before, after - call.capacity); t < after; ++t)
                std::memcpy(of_ring(t), fresh(t), size);
    }
};

} // namespace

void append_rows(Isa isa, const KvRowsCall& call, int threads) {
    std::vector<int64_t> slots;
    for (int64_t row = 0; row < call.batch; ++row)
        for (const KvRowsSide* side : {&call.keys, &call.values}) {
            const Row of{call, *side, row};
            of.encode_leaving(isa, side == &call.keys, slots, threads); // before the ring is written over
            of.keep_new();
        }
}

} // namespace bitpalette
