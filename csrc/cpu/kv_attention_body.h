// The body of kv_attention_*.cpp over the vocabulary V of kv_lanes_*.h.
//
// Page by page: scores of all queries of the head by integer products, online softmax (Milakov and Gimelshein, arXiv
// 1805.02867), outputs by integer products. A weight p of the softmax times the gain of its value is rounded to P of 15
// bits with the page's largest as its unit, in two signed bytes, 256 high + low = 2 P: 3e-5 of the page's largest.
#pragma once

#include "kv_attention.h"
#include "kv_products.h"
#include "kv_softmax.h"

namespace bitpalette {
namespace {

constexpr float largest_weight = 16319; // 128 * 127 + 63

// Memory of a task, in pieces that begin on lines.
struct KvRoom {
    uint8_t* nibbles; // [64, width / 4]
    uint32_t *words, *high, *codes;
    int32_t* scores;    // [rows * planes, 64]
    int8_t* weights;    // [rows, 2, 64]
    int32_t* start;     // [rows, 2]
    float *unit, *keep; // [rows]
    float* sums;        // [rows, columns]
    float* chances;     // [rows, 64]
    int64_t bytes;
};

inline int64_t kv_columns(int64_t width, int bits) {
    const int64_t codes = kv_codes_of_byte(bits);
    return (width / codes + 15) / 16 * 16 * codes;
}

inline KvRoom kv_room(const KvAttentionCall& c, uint8_t* base) {
    KvRoom room{};
    int64_t used = 0;
    const auto take = [&](auto*& piece, int64_t count) {
        using T = std::remove_reference_t<decltype(*piece)>;
        piece = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
        used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    };
    const int64_t rows = c.group * c.tokens, width = c.head_dim > c.head_dim_v ? c.head_dim : c.head_dim_v;
    // packed, a byte is at most `width` of a row; 64 more for what a last piece of 16 bytes fills up
    const int64_t most_words = 16 * (width + 64);
    take(room.nibbles, 16 * width);
    take(room.words, most_words);
    take(room.high, most_words);
    take(room.codes, most_words);
    take(room.scores, rows * (c.exact ? 2 : 1) * kv_page);
    take(room.weights, rows * 2 * kv_page);
    take(room.start, rows * 2);
    take(room.unit, rows);
    take(room.keep, rows);
    take(room.sums, rows * kv_columns(c.head_dim_v, c.bits_v));
    take(room.chances, rows * kv_page);
    room.bytes = used;
    return room;
}

inline int64_t kv_room_bytes(const KvAttentionCall& call) {
    return kv_room(call, nullptr).bytes;
}

// What l = 2 c - offset subtracts, c as `quad_of` makes it.
template <class V, int Bits>
constexpr int32_t level_offset = Bits == 8 && V::signed_bytes ? -1 : (1 << Bits) - 1;

// room.codes of 64 rows of keys, or of values (By::columns: interleaved for a product over tokens).
enum class By { words, columns };
template <class V, int Bits, By by>
inline void unpack_page(const uint8_t* page, const uint8_t* next, int64_t width, const KvRoom& room) {
    const int64_t stride = kv_row_bytes(width, Bits), bytes = width / kv_codes_of_byte(Bits);
    const int64_t inner = by == By::words ? kv_page : (bytes + 15) / 16 * 16;
    const int64_t outer = by == By::words ? (bytes + 3) / 4 : kv_page / 4;
    const auto move = [&](const uint8_t* rows, int64_t row, const uint8_t* after, uint32_t* words) {
        if constexpr (by == By::words)
            transpose_rows<V>(rows, row, bytes, after, words);
        else
            interleave_rows<V>(rows, row, bytes, after, inner, words);
    };
    move(page, stride, next, room.words);
    if constexpr (Bits == 3) {
        for (int64_t t = 0; t < kv_page; ++t)
            V::nibbles(page + t * stride + bytes, width / 8, room.nibbles + t * bytes);
        move(room.nibbles, bytes, nullptr, room.high);
    }
    expand<V, Bits>(room.words, room.high, outer, inner, room.codes);
}

// room.scores = products of the queries' codes and those of the page's keys, without the offset of levels.
template <class V, int Bits>
inline void score_page(const KvQueries& q, int64_t rows, const KvRoom& room) {
    const auto store = [&](int64_t row, int64_t column, auto& sum) {
        for (auto& of_row : sum) {
            int32_t* to = room.scores + row++ * kv_page + column;
            for (auto& s : of_row) {
                V::store_ints(to, s);
                to += V::lanes;
            }
        }
    };
    const uint32_t* codes = room.codes;
    const int64_t all = rows * q.planes, tiled = all / V::tile_rows * V::tile_rows, x_row = 4 * q.quads;
    products<V, Bits == 8, V::tile_rows>(codes, kv_page, q.quads, q.codes, x_row, nullptr, 0, tiled, store);
    products<V, Bits == 8, 1>(codes, kv_page, q.quads, q.codes, x_row, nullptr, tiled, all, store);
}

// room.sums = room.sums * keep + weighted values of the page.
template <class V, int Bits>
inline void add_page(int64_t rows, int64_t columns, const KvRoom& room) {
    const auto add = [&](int64_t row, int64_t column, auto& sum) {
        for (size_t r = 0; r < sizeof sum / sizeof *sum; r += 2, row += 2) {
            float* to = room.sums + row / 2 * columns + column;
            const auto unit = V::all(room.unit[row / 2]), keep = V::all(room.keep[row / 2]);
            for (size_t c = 0; c < sizeof *sum / sizeof **sum; ++c, to += V::lanes) {
                const auto now = V::to_floats(V::combined(sum[r][c], sum[r + 1][c]));
                V::store(to, V::multiply_add(now, unit, V::multiply(V::load(to), keep)));
            }
        }
    };
    constexpr int64_t quads = kv_page / 4;
    const int64_t all = 2 * rows, tiled = all / V::tile_rows * V::tile_rows;
    products<V, Bits == 8, V::tile_rows>(room.codes, columns, quads, room.weights, kv_page, room.start, 0, tiled, add);
    products<V, Bits == 8, 2>(room.codes, columns, quads, room.weights, kv_page, room.start, tiled, all, add);
}

// room.weights, unit and start of one query: P of chance * gain in two bytes.
template <class V>
inline void round_weights(const float* chance, const float* gain, int32_t offset, int64_t r, const KvRoom& room) {
    alignas(64) float product[kv_page];
    typename V::Floats most = V::zero(), total = V::zero();
    for (int64_t t = 0; t < kv_page; t += V::lanes) {
        const auto p = V::multiply(V::load(chance + t), V::load(gain + t));
        V::store(product + t, p);
        most = V::maximum(most, V::maximum(p, V::subtract(V::zero(), p)));
        total = V::add(total, p); // NaN and infinity end up here, and a maximum can lose them
    }
    const float largest = V::largest(most), poison = 0 * V::total(total);
    // what is below 1e-30 of the largest so far does not count, and 1 / largest must not overflow
    const bool counts = largest > 1e-30f && poison == 0;
    const auto inverse = V::all(counts ? largest_weight / largest : 0.0f), magic = V::all(12582912.0f);
    typename V::Floats sum = V::zero();
    for (int64_t t = 0; t < kv_page; t += V::lanes) {
        // 1.5 * 2^23 rounds to a whole number
        auto p = V::load(product + t);
        p = counts ? V::subtract(V::multiply_add(p, inverse, magic), magic) : V::zero();
        // halves up: low, -64..63, is doubled and has to stay a byte
        const auto high = V::subtract(V::multiply_add(V::add(p, V::all(0.25f)), V::all(1.0f / 128), magic), magic);
        const auto low = V::multiply_add(high, V::all(-128.0f), p);
        V::store_bytes(room.weights + (2 * r) * kv_page + t, high);
        V::store_bytes(room.weights + (2 * r + 1) * kv_page + t, V::add(low, low));
        sum = V::add(sum, p); // whole and below 2^20: exact
    }
    room.unit[r] = largest / largest_weight + poison;
    room.start[2 * r] = 0;
    room.start[2 * r + 1] = -offset * static_cast<int32_t>(V::total(sum));
}

// What a page costs beyond its products: scores in float32, softmax, weights.
template <class V, int BitsK>
inline void weigh_page(const KvAttentionCall& c, const KvQueries& q, const KvSpan& span, int64_t base, int64_t n,
                       const float* k_gain, const float* v_gain, int32_t offset, const KvRoom& room,
                       const KvPartial& to) {
    alignas(64) float score[kv_page], chance[kv_page], seen_gain[kv_page];
    for (int64_t r = 0; r < c.group * c.tokens; ++r) {
        const KvRange range = seen_range(span, r % c.tokens, base, n);
        if (range.from >= range.to) {
            std::memset(room.weights + 2 * r * kv_page, 0, 2 * kv_page);
            room.start[2 * r] = room.start[2 * r + 1] = 0;
            room.unit[r] = 0;
            room.keep[r] = 1;
            continue;
        }
        const int32_t* products = room.scores + r * q.planes * kv_page;
        const auto unit = V::all(2 * q.scale[r]), low_unit = V::all(2 * q.scale[r] / 254);
        const auto shift = V::all(-static_cast<float>(level_offset<V, BitsK>) * q.scale[r] * q.sum[r]);
        for (int64_t t = 0; t < kv_page; t += V::lanes) {
            auto s = V::multiply_add(V::to_floats(V::load_ints(products + t)), unit, shift);
            if (q.planes == 2)
                s = V::multiply_add(V::to_floats(V::load_ints(products + kv_page + t)), low_unit, s);
            V::store(score + t, V::multiply(s, V::load(k_gain + t)));
        }
        const float* gain = v_gain;
        if (range.from > 0 || range.to < kv_page) {
            for (int64_t t = 0; t < kv_page; ++t)
                seen_gain[t] = t >= range.from && t < range.to ? v_gain[t] : 0.0f;
            gain = seen_gain;
        }
        room.keep[r] = softmax_block<V>(score, range, c.softcap, chance, to.most + r, to.weight + r);
        round_weights<V>(chance, gain, offset, r, room);
    }
}

template <class V>
inline void unpack_keys(const KvAttentionCall& c, const KvQueries& q, int64_t rows, const uint8_t* page,
                        const uint8_t* next, const KvRoom& room) {
    const auto step = [&](auto bits) {
        constexpr int b = decltype(bits)::value;
        unpack_page<V, b, By::words>(page, next, c.head_dim, room);
        score_page<V, b>(q, rows, room);
    };
    with_bits(c.bits_k, step);
}

template <class V>
inline void unpack_values(const KvAttentionCall& c, int64_t rows, int64_t columns, const uint8_t* page,
                          const uint8_t* next, const KvRoom& room) {
    const auto step = [&](auto bits) {
        constexpr int b = decltype(bits)::value;
        unpack_page<V, b, By::columns>(page, next, c.head_dim_v, room);
        add_page<V, b>(rows, columns, room);
    };
    with_bits(c.bits_v, step);
}

// byte[n]: the byte of a row that column n of V's interleaved words is about, -1 where none is. Found by interleaving
// bytes that are numbered from 1, digit by digit. rows [4, bytes], words: room.
template <class V>
inline void find_order(int64_t bytes, int64_t columns, uint8_t* rows, uint32_t* words, int32_t* byte) {
    for (int64_t n = 0; n < columns; ++n)
        byte[n] = -1;
    for (int64_t digit = 0, unit = 1; digit < 2; ++digit, unit *= 128) {
        for (int64_t i = 0; i < bytes; ++i)
            rows[i] = static_cast<uint8_t>((i + 1) / unit % 128);
        for (int64_t row = 1; row < 4; ++row)
            std::memcpy(rows + row * bytes, rows, static_cast<size_t>(bytes));
        V::interleave(rows, bytes, bytes, words);
        for (int64_t n = 0; n < columns; ++n)
            byte[n] += static_cast<int32_t>(unit * static_cast<int64_t>(words[n] & 127));
    }
}

// sums [rows, columns] in V's order to [rows, width]
template <class V>
inline void reorder(const KvAttentionCall& c, int64_t rows, int64_t columns, const KvRoom& room, float* to) {
    const int64_t codes = kv_codes_of_byte(c.bits_v), inner = columns / codes;
    auto* byte = reinterpret_cast<int32_t*>(room.codes);
    find_order<V>(c.head_dim_v / codes, inner, room.nibbles, room.words, byte);
    for (int64_t r = 0; r < rows; ++r, to += c.head_dim_v)
        for (int64_t s = 0; s < codes; ++s)
            for (int64_t n = 0; n < inner; ++n)
                if (byte[n] >= 0)
                    to[byte[n] * codes + s] = room.sums[r * columns + s * inner + n];
}

template <class V>
void attend_page_range(const KvAttentionCall& c, const KvQueries& q, int64_t row, int64_t kv_head, int64_t first,
                       int64_t last, uint8_t* memory, const KvPartial& to) {
    const KvRoom room = kv_room(c, memory);
    const KvSpan span = kv_span(c, row);
    const int64_t rows = c.group * c.tokens, columns = kv_columns(c.head_dim_v, c.bits_v);
    const int64_t k_page = kv_page * kv_row_bytes(c.head_dim, c.bits_k);
    const int64_t v_page = kv_page * kv_row_bytes(c.head_dim_v, c.bits_v);
    const auto page_at = [&](int64_t token) {
        return static_cast<int64_t>(c.block_table[row * c.table_row + token / kv_page]) * c.kv_heads + kv_head;
    };
    clear_partial(rows, to);
    std::memset(room.sums, 0, static_cast<size_t>(rows * columns) * sizeof(float));
    alignas(64) float k_gain[kv_page], v_gain[kv_page];
    for (int64_t token = first; token < last; token += kv_page) {
        const int64_t n = last - token < kv_page ? last - token : kv_page, page = page_at(token);
        const bool more = token + kv_page < last;
        const int64_t after = more ? page_at(token + kv_page) : 0;
        const uint8_t* next_k = more ? c.k_codes + after * k_page : nullptr;
        const uint8_t* next_v = more ? c.v_codes + after * v_page : nullptr;
        for (int64_t t = 0; t < kv_page; t += V::lanes) {
            const auto gain_at = [&](const uint16_t* gains) {
                return V::load(reinterpret_cast<const Fp16*>(gains + page * kv_page + t));
            };
            V::store(k_gain + t, gain_at(c.k_gain));
            V::store(v_gain + t, gain_at(c.v_gain));
        }
        unpack_keys<V>(c, q, rows, c.k_codes + page * k_page, next_k, room);
        with_bits(c.bits_v, [&](auto v_bits) {
            const int32_t offset = level_offset<V, decltype(v_bits)::value>;
            with_bits(c.bits_k, [&](auto k_bits) {
                weigh_page<V, decltype(k_bits)::value>(c, q, span, span.sinks + token, n, k_gain, v_gain, offset, room,
                                                       to);
            });
        });
        unpack_values<V>(c, rows, columns, c.v_codes + page * v_page, next_v, room);
    }
    reorder<V>(c, rows, columns, room, to.sums);
}

template <class V>
void attend_dense(const KvAttentionCall& c, const KvQueries& q, int64_t row, int64_t kv_head, uint8_t* memory,
                  const KvPartial& to) {
    const KvRoom room = kv_room(c, memory);
    const KvSpan span = kv_span(c, row);
    const int64_t rows = c.group * c.tokens;
    clear_partial(rows, to);
    std::memset(to.sums, 0, static_cast<size_t>(rows * c.head_dim_v) * sizeof(float));
    const auto both = [&](auto element) {
        using T = decltype(element);
        dense_tokens<V, T>(c, q, span, c.sinks, 0, span.sinks, row, kv_head, room.chances, room.keep, to);
        dense_tokens<V, T>(c, q, span, c.window, span.sinks + span.pages, span.window, row, kv_head, room.chances,
                           room.keep, to);
        dense_tokens<V, T>(c, q, span, c.fresh, span.total - span.fresh, span.fresh, row, kv_head, room.chances,
                           room.keep, to);
    };
    if (c.dense_dtype == Dtype::f32)
        both(float{});
    else if (c.dense_dtype == Dtype::f16)
        both(Fp16{});
    else
        both(Bf16{});
}

template <class V>
constexpr KvAttentionUnit kv_attention_unit{kv_room_bytes, attend_page_range<V>, attend_dense<V>};

} // namespace
} // namespace bitpalette
