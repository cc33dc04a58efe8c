#include "kv_rows.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "kv_append.h"
#include "kv_attention.h"

namespace bitpalette {
namespace {

int64_t bytes_of(Dtype dtype) {
    return dtype == Dtype::f32 ? 4 : 2;
}

// The first token that is read from the ring.
int64_t exact_start(const KvRows& rows, int64_t row) {
    const int64_t start = std::max(rows.length[row] - rows.most_window, rows.exact_from[row]);
    return std::min(std::max(start, rows.most_sinks), std::max(rows.length[row], rows.most_sinks));
}

int64_t skipped(const int64_t* skip, int64_t row) {
    return skip == nullptr ? 0 : skip[row];
}

// One side of one row, while `tokens` new ones come.
struct Row {
    const KvRows& rows;
    const KvRowsSide& side;
    const KvNew& fresh;
    int64_t row, skip;

    int64_t token_bytes() const { return rows.heads * side.width * bytes_of(rows.dtype); }
    const char* of_fresh(int64_t token) const {
        const int64_t index = token - rows.length[row] + skip;
        return static_cast<const char*>(fresh.x) +
               (row * fresh.batch_stride + index * fresh.token_stride) * bytes_of(rows.dtype);
    }
    char* of_ring(int64_t token) const {
        return static_cast<char*>(side.ring) + (row * rows.capacity + token % rows.capacity) * token_bytes();
    }
    char* of_sinks(int64_t token) const {
        return static_cast<char*>(side.sinks) + (row * rows.most_sinks + token) * token_bytes();
    }

    // Tokens first..last-1 to their pages, `x` the first of them and the others `stride` elements apart.
    void encode(Isa isa, const void* x, int64_t stride, int64_t first, int64_t last, std::vector<int64_t>& slots,
                int threads) const {
        slots.clear();
        for (int64_t token = first; token < last; ++token) {
            const int64_t place = token - rows.most_sinks, page = place / kv_page;
            if (place < 0 || page >= rows.table_row)
                throw std::invalid_argument("kv rows: token " + std::to_string(token) + " of row " +
                                            std::to_string(row) + " has no page in a table of " +
                                            std::to_string(rows.table_row));
            slots.push_back(rows.block_table[row * rows.table_row + page] * kv_page + place % kv_page);
        }
        const KvTokens tokens{x, rows.dtype, stride, side.width, last - first, rows.heads, side.width, nullptr, false};
        const bool unbiased = &side == &rows.keys;
        append_tokens(isa, tokens, {side.codes, side.gain, rows.pages, side.bits, unbiased, slots.data()}, threads);
    }

    void encode_leaving(Isa isa, int64_t until, std::vector<int64_t>& slots, int threads) const {
        const int64_t held = std::min(until, rows.length[row]);
        int64_t token = rows.quantized[row];
        while (token < held) {
            const int64_t n = std::min(held - token, rows.capacity - token % rows.capacity);
            encode(isa, of_ring(token), rows.heads * side.width, token, token + n, slots, threads);
            token += n;
        }
        if (token < until)
            encode(isa, of_fresh(token), fresh.token_stride, token, until, slots, threads);
    }

    void keep_new(int64_t after) const {
        const int64_t before = rows.length[row];
        const auto size = static_cast<size_t>(token_bytes());
        for (int64_t t = before; t < std::min(after, rows.most_sinks); ++t)
            std::memcpy(of_sinks(t), of_fresh(t), size);
        if (rows.capacity > 0)
            for (int64_t t = std::max(before, after - rows.capacity); t < after; ++t)
                std::memcpy(of_ring(t), of_fresh(t), size);
    }
};

void store_side(Isa isa, const KvRows& rows, const KvNew& x, int64_t width, const float* mean, int64_t tokens,
                void* stored, int threads) {
    const int64_t size = bytes_of(rows.dtype);
    for (int64_t row = 0; row < rows.batch; ++row) {
        const KvTokens of{static_cast<const char*>(x.x) + row * x.batch_stride * size,
                          rows.dtype,
                          x.token_stride,
                          x.head_stride,
                          tokens,
                          rows.heads,
                          width,
                          mean,
                          true};
        rotate_tokens(isa, of, rows.dtype, static_cast<char*>(stored) + row * tokens * rows.heads * width * size,
                      threads);
    }
}

} // namespace

void store_tokens(Isa isa, const KvRows& rows, const KvNew& k, const KvNew& v, int64_t tokens, void* stored_k,
                  void* stored_v, int threads) {
    store_side(isa, rows, k, rows.keys.width, rows.mean, tokens, stored_k, threads);
    store_side(isa, rows, v, rows.values.width, nullptr, tokens, stored_v, threads);
}

bool append_tokens_to_rows(Isa isa, const KvRows& rows, const KvNew& k, const KvNew& v, int64_t tokens,
                           const int64_t* skip, int threads) {
    const auto length_after = [&](int64_t row) { return rows.length[row] + tokens - skipped(skip, row); };
    const auto until = [&](int64_t row) { return std::max(rows.quantized[row], length_after(row) - rows.most_window); };
    for (int64_t row = 0; row < rows.batch; ++row)
        if (until(row) > rows.quantized[row] && until(row) > rows.claimed[row])
            return false;
    std::vector<int64_t> slots;
    for (int64_t row = 0; row < rows.batch; ++row) {
        const int64_t after = length_after(row), quantized = until(row);
        for (const auto& [side, fresh] : {std::pair{&rows.keys, &k}, std::pair{&rows.values, &v}}) {
            const Row of{rows, *side, *fresh, row, skipped(skip, row)};
            of.encode_leaving(isa, quantized, slots, threads); // before the ring is written over
            of.keep_new(after);
        }
        rows.length[row] = after;
        rows.quantized[row] = quantized;
        rows.exact_from[row] = std::max(rows.exact_from[row], after - rows.capacity);
    }
    return true;
}

void attend_rows(Isa isa, const KvRows& rows, const KvRowsQuery& query, const KvNew& k, const KvNew& v,
                 const int64_t* skip, int threads) {
    const auto batch = static_cast<size_t>(rows.batch);
    std::vector<int32_t> ints(6 * batch);
    int32_t *in_sinks = ints.data(), *in_pages = in_sinks + batch, *in_window = in_pages + batch,
            *oldest = in_window + batch, *in_fresh = oldest + batch, *first_fresh = in_fresh + batch;
    for (int64_t row = 0; row < rows.batch; ++row) {
        const int64_t start = exact_start(rows, row), length = rows.length[row], skip_row = skipped(skip, row);
        in_sinks[row] = static_cast<int32_t>(std::min(length, rows.most_sinks));
        in_pages[row] = static_cast<int32_t>(std::max<int64_t>(start - rows.most_sinks, 0));
        in_window[row] = static_cast<int32_t>(std::max<int64_t>(length - start, 0));
        oldest[row] = rows.capacity > 0 ? static_cast<int32_t>(start % rows.capacity) : 0;
        in_fresh[row] = static_cast<int32_t>(query.tokens - skip_row);
        first_fresh[row] = static_cast<int32_t>(std::min(skip_row, query.tokens - 1));
    }
    const int64_t k_token = rows.heads * rows.keys.width, v_token = rows.heads * rows.values.width;
    const auto dense = [&](void* keys, void* values, int64_t slots, const int32_t* lengths, const int32_t* first) {
        if (slots == 0)
            return KvDense{};
        return KvDense{keys,
                       values,
                       slots * k_token,
                       k_token,
                       rows.keys.width,
                       slots * v_token,
                       v_token,
                       rows.values.width,
                       lengths,
                       first,
                       slots};
    };
    KvDense fresh{};
    if (k.x != nullptr)
        fresh = {k.x,           v.x,      k.batch_stride, k.token_stride, k.head_stride, v.batch_stride, v.token_stride,
                 v.head_stride, in_fresh, first_fresh,    query.tokens};

    const int64_t heads = rows.heads * query.group, width = rows.keys.width, width_v = rows.values.width;
    const int64_t vectors = rows.batch * heads * query.tokens;
    std::vector<float> rotated(static_cast<size_t>(vectors * width)), found(static_cast<size_t>(vectors * width_v));
    for (int64_t row = 0; row < rows.batch; ++row) {
        const KvTokens of{static_cast<const char*>(query.q) + row * query.batch_stride * bytes_of(query.dtype),
                          query.dtype,
                          query.head_stride,
                          query.token_stride,
                          heads,
                          query.tokens,
                          width,
                          nullptr,
                          true};
        rotate_tokens(isa, of, Dtype::f32, rotated.data() + row * heads * query.tokens * width, threads);
    }
    const KvAttentionCall call{rows.keys.codes,
                               rows.values.codes,
                               rows.keys.gain,
                               rows.values.gain,
                               rows.keys.bits,
                               rows.values.bits,
                               rows.block_table,
                               rows.table_row,
                               in_pages,
                               dense(rows.keys.sinks, rows.values.sinks, rows.most_sinks, in_sinks, nullptr),
                               dense(rows.keys.ring, rows.values.ring, rows.capacity, in_window, oldest),
                               fresh,
                               rows.dtype,
                               nullptr,
                               rows.batch,
                               rows.heads,
                               query.group,
                               query.tokens,
                               width,
                               width_v,
                               query.scale,
                               query.softcap,
                               query.sliding_window,
                               query.sink_logits,
                               query.exact,
                               rotated.data(),
                               Dtype::f32,
                               found.data(),
                               Dtype::f32};
    attend_pages(isa, call, threads);
    for (int64_t row = 0; row < rows.batch; ++row) {
        const int64_t first = row * heads * query.tokens * width_v;
        const KvTokens of{found.data() + first,
                          Dtype::f32,
                          width_v,
                          query.tokens * width_v,
                          query.tokens,
                          heads,
                          width_v,
                          nullptr,
                          true};
        rotate_tokens(isa, of, query.dtype, static_cast<char*>(query.out) + first * bytes_of(query.dtype), threads);
    }
}

} // namespace bitpalette
