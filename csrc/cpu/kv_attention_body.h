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
    uint32_t *words, *high;
    int32_t* scores;    // [rows * planes, 64]
    int8_t* weights;    // [rows, 2, 64]
    int32_t* start;     // [rows, 2]
    float *unit, *keep; // [rows]
    float* sums;        // [rows, columns]
    float* chances;     // [rows, 64], at least 8 rows of bytes
    int32_t* order;     // [columns]
    int64_t bytes;
};

// Columns of the words of a page's values.
inline int64_t kv_word_columns(int64_t width, int bits) {
    const int64_t halves = bits == 3 ? 2 : 1, bytes = width / kv_codes_of_byte(bits) / halves;
    return (bytes + 15) / 16 * 16 * halves;
}
inline int64_t kv_columns(int64_t width, int bits) {
    return kv_word_columns(width, bits) * kv_codes_of_byte(bits);
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
    take(room.words, most_words);
    take(room.high, most_words);
    take(room.scores, rows * (c.exact ? 2 : 1) * kv_page);
    take(room.weights, rows * 2 * kv_page);
    take(room.start, rows * 2);
    take(room.unit, rows);
    take(room.keep, rows);
    take(room.sums, rows * kv_columns(c.head_dim_v, c.bits_v));
    take(room.chances, rows * kv_page > 2 * width ? rows * kv_page : 2 * width);
    take(room.order, width + 64);
    room.bytes = used;
    return room;
}

inline int64_t kv_room_bytes(const KvAttentionCall& call) {
    return kv_room(call, nullptr).bytes;
}

// What l = 2 c - offset subtracts, c as `quad_of` makes it.
template <class V, int Bits>
constexpr int32_t level_offset = Bits == 8 && V::signed_bytes ? -1 : (1 << Bits) - 1;

// room.words and high of 64 rows of keys.
template <class V, int Bits>
inline void transpose_keys(const uint8_t* page, int64_t width, const KvRoom& room, KvAhead& ahead) {
    const int64_t stride = kv_row_bytes(width, Bits), bytes = width / kv_codes_of_byte(Bits);
    transpose_rows<V, Bits == 3>(page, stride, bytes, room.words, ahead);
    if constexpr (Bits == 3)
        transpose_rows<V, false>(page + bytes, stride, width / 8, room.high, ahead);
}

// room.words and high of 64 rows of values.
template <class V, int Bits>
inline void interleave_values(const uint8_t* page, int64_t width, const KvRoom& room, KvAhead& ahead) {
    const int64_t stride = kv_row_bytes(width, Bits), bytes = width / kv_codes_of_byte(Bits);
    const int64_t columns = kv_word_columns(width, Bits);
    KvAhead::Run run = ahead.next(16);
    for (int64_t t = 0; t < kv_page; t += 8) {
        uint32_t* to = room.words + t / 4 * columns;
        if constexpr (Bits == 3)
            V::interleave_planes(page + t * stride, stride, bytes, columns, to, room.high + t / 8 * columns);
        else
            V::interleave(page + t * stride, stride, bytes, columns, to);
        run.ask();
        run.ask();
    }
}

// room.scores = products of the queries' codes and those of the page's keys, without the offset of levels.
template <class V, int Bits>
inline void score_page(const KvQueries& q, int64_t rows, const KvRoom& room, KvAhead& ahead) {
    const auto store = [&](int64_t row, int64_t token, auto& sum) {
        for (auto& of_row : sum) {
            int32_t* to = room.scores + row++ * kv_page + token;
            for (auto& s : of_row) {
                V::store_ints(to, s);
                to += V::lanes;
            }
        }
    };
    const int64_t pairs = q.quads / (kv_codes_of_byte(Bits) * kv_paired<Bits>);
    score_products<V, Bits>(room.words, room.high, pairs, q.codes, 4 * q.quads, rows * q.planes, ahead, store);
}

// room.sums = room.sums * keep + weighted values of the page.
template <class V, int Bits>
inline void add_page(int64_t rows, int64_t width, const KvRoom& room, KvAhead& ahead) {
    const int64_t words = kv_word_columns(width, Bits), columns = kv_columns(width, Bits);
    const auto add = [&](int64_t row, int64_t column, auto& sum, int at) {
        for (size_t r = 0; r < sizeof sum / sizeof *sum; r += 2, row += 2) {
            float* to = room.sums + row / 2 * columns + column;
            const auto unit = V::all(room.unit[row / 2]), keep = V::all(room.keep[row / 2]);
            const auto now = V::to_floats(V::combined(sum[r][at], sum[r + 1][at]));
            V::store(to, V::multiply_add(now, unit, V::multiply(V::load(to), keep)));
        }
    };
    output_products<V, Bits>(room.words, words, room.high, room.weights, room.start, 2 * rows, ahead, add);
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

// byte[n]: the byte of a row (of 3 bits, of its high plane) that column n of V's interleaved words is about, -1 where
// none is. Found by interleaving bytes that are numbered from 1, digit by digit.
template <class V>
inline void find_order(int64_t bytes, int64_t columns, bool planes, const KvRoom& room, int32_t* byte) {
    auto* rows = reinterpret_cast<uint8_t*>(room.chances); // [8, bytes], [8, 3, bytes] with planes
    const int64_t stride = planes ? 3 * bytes : bytes;
    for (int64_t n = 0; n < columns; ++n)
        byte[n] = -1;
    for (int digit = 0; digit < 2; ++digit) {
        for (int64_t row = 0; row < 8 * stride; row += bytes)
            for (int64_t i = 0; i < bytes; ++i)
                rows[row + i] = static_cast<uint8_t>((i + 1) >> 7 * digit & 127);
        if (planes)
            V::interleave_planes(rows, stride, 2 * bytes, 2 * columns, room.words, room.high);
        else
            V::interleave(rows, stride, bytes, columns, room.high);
        for (int64_t n = 0; n < columns; ++n)
            byte[n] += static_cast<int32_t>((room.high[n] & 127) << 7 * digit);
    }
}

// sums [rows, columns] in V's order to [rows, width]
template <class V>
inline void reorder(const KvAttentionCall& c, int64_t rows, int64_t columns, const KvRoom& room, float* to) {
    const int64_t codes = kv_codes_of_byte(c.bits_v), halves = c.bits_v == 3 ? 2 : 1;
    const int64_t half = columns / codes / halves;
    int32_t* byte = room.order;
    find_order<V>(c.head_dim_v / codes / halves, half, halves == 2, room, byte);
    for (int64_t r = 0; r < rows; ++r, to += c.head_dim_v) {
        const float* sums = room.sums + r * columns;
        for (int64_t s = 0; s < codes; ++s)
            for (int64_t odd = 0; odd < halves; ++odd, sums += half)
                for (int64_t n = 0; n < half; ++n)
                    if (const int64_t at = byte[n]; at >= 0)
                        to[(at * halves + odd) * codes + s] = sums[n];
    }
}

// The lines of a page's codes.
inline KvAhead page_ahead(const KvAttentionCall& c, int64_t page) {
    const int64_t k_page = kv_page * kv_row_bytes(c.head_dim, c.bits_k);
    const int64_t v_page = kv_page * kv_row_bytes(c.head_dim_v, c.bits_v);
    for (const uint16_t* gain : {c.k_gain + page * kv_page, c.v_gain + page * kv_page})
        for (int64_t i = 0; i < kv_page; i += 32)
            __builtin_prefetch(gain + i, 0, 3);
    const uint8_t *k = c.k_codes + page * k_page, *v = c.v_codes + page * v_page;
    return {{k, k + k_page}, {v, v + v_page}};
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
        KvAhead ahead{};
        if (token + kv_page < last)
            ahead = page_ahead(c, page_at(token + kv_page));
        for (int64_t t = 0; t < kv_page; t += V::lanes) {
            const auto gain_at = [&](const uint16_t* gains) {
                return V::load(reinterpret_cast<const Fp16*>(gains + page * kv_page + t));
            };
            V::store(k_gain + t, gain_at(c.k_gain));
            V::store(v_gain + t, gain_at(c.v_gain));
        }
        with_bits(c.bits_k, [&](auto bits) {
            constexpr int b = decltype(bits)::value;
            transpose_keys<V, b>(c.k_codes + page * k_page, c.head_dim, room, ahead);
            score_page<V, b>(q, rows, room, ahead);
        });
        with_bits(c.bits_v, [&](auto v_bits) {
            const int32_t offset = level_offset<V, decltype(v_bits)::value>;
            with_bits(c.bits_k, [&](auto k_bits) {
                weigh_page<V, decltype(k_bits)::value>(c, q, span, span.sinks + token, n, k_gain, v_gain, offset, room,
                                                       to);
            });
        });
        with_bits(c.bits_v, [&](auto bits) {
            constexpr int b = decltype(bits)::value;
            interleave_values<V, b>(c.v_codes + page * v_page, c.head_dim_v, room, ahead);
            add_page<V, b>(rows, c.head_dim_v, room, ahead);
        });
        ahead.rest();
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
