// Attention of a few new tokens over a paged cache of codes, with the tokens that are kept in 16 bits around it
// (csrc/cpu/kv_attention.h has the same for CPUs, kernels/kv_reference.py the definition).
//
// The tokens of a row and kv head are split among blocks: some take those in 16 bits (kv_dense.cuh), the others equal
// runs of half pages (kv_pages.cuh). Within a block the warps take half pages in turn, each through a ring of stages of
// its own in shared memory, without a barrier, and each with an online softmax of its own; at the end the block adds
// them up. A second kernel adds the blocks' parts, in their order: results are the same from run to run.
//
// A block has up to 8 Tiles rows of queries, of all heads of a kv head and all new tokens; where there are more, blocks
// of their own have them. Queries are scaled by a power of two and rounded to fp16, codes are exact in it, gains
// multiply the scores and the weights. Weights are relative to a power of two about as large as the gains of values.
#pragma once

#include "elements.cuh"
#include "kv_dense.cuh"
#include "kv_pages.cuh"

namespace bitpalette {

// call(integral constant) of the bits; Fixed: 0 where they are known at run time only.
template <int Fixed, class Call>
BP_DEVICE void kv_with_bits(int bits, Call call) {
    if constexpr (Fixed != 0)
        call(std::integral_constant<int, Fixed>());
    else if (bits == 2)
        call(std::integral_constant<int, 2>());
    else if (bits == 3)
        call(std::integral_constant<int, 3>());
    else if (bits == 4)
        call(std::integral_constant<int, 4>());
    else
        call(std::integral_constant<int, 8>());
}

// Keys, then values, then 32 gains of each.
BP_HOST_DEVICE constexpr int kv_stage_bytes(int row_bytes_k, int row_bytes_v) {
    return kv_step * (row_bytes_k + row_bytes_v) + 2 * kv_step * 2;
}
// Of a warp: its ring, and behind it room for a step whose rows are narrower than Width.
BP_HOST_DEVICE constexpr int kv_warp_bytes(int width, int bits_k, int bits_v, int head_dim, int head_dim_v,
                                           int stages) {
    const int stage = kv_stage_bytes(head_dim * bits_k / 8, head_dim_v * bits_v / 8);
    const int keys = head_dim == width ? 0 : kv_step * width * bits_k / 8;
    const int values = head_dim_v == width ? 0 : kv_step * width * bits_v / 8;
    return stages * stage + keys + values;
}
// Queries in fp32 and their factors; behind them the rings, and in their place, at the end, what the warps have.
BP_HOST_DEVICE constexpr int kv_query_stride(int width) {
    return width + 4;
}
BP_HOST_DEVICE constexpr int kv_query_bytes(int width, int tiles) {
    return 8 * tiles * (kv_query_stride(width) + 4) * 4;
}
BP_HOST_DEVICE constexpr int kv_result_bytes(int width, int tiles, int warps) {
    return warps * 8 * tiles * (width + 2) * 4;
}

template <int Width, int Tiles, int BitsK, int BitsV>
class KvAttention {
  public:
    static constexpr int queries = 8 * Tiles;
    static constexpr int stride = kv_query_stride(Width);
    // Kernels that know their bits have keys and values of Width elements: everything of a row is known.
    static constexpr bool exact = BitsK != 0;
    static_assert((BitsK != 0) == (BitsV != 0));

    BP_DEVICE KvAttention(const KvAttentionArgs& args, uint8_t* shared, int warps, int stages)
        : args_(args), warps_(warps), stages_(stages), lane_(static_cast<int>(ptx::lane())),
          warp_(static_cast<int>(ptx::warp())), rows_(args.group * args.tokens),
          query_(reinterpret_cast<float*>(shared)), factor_(query_ + queries * stride),
          rings_(shared + kv_query_bytes(Width, Tiles)) {
        unsigned index = ptx::block();
        split_ = static_cast<int>(index % static_cast<unsigned>(args.splits));
        index /= static_cast<unsigned>(args.splits);
        const unsigned blocks = static_cast<unsigned>((rows_ + queries - 1) / queries);
        first_query_ = static_cast<int>(index % blocks) * queries;
        index /= blocks;
        head_ = static_cast<int>(index % static_cast<unsigned>(args.kv_heads));
        row_ = static_cast<int>(index / static_cast<unsigned>(args.kv_heads));
        const int bits_k = exact ? BitsK : args.bits_k, bits_v = exact ? BitsV : args.bits_v;
        row_bytes_k_ = head_dim() * bits_k / 8;
        row_bytes_v_ = head_dim_v() * bits_v / 8;
        ring_ = rings_ + warp_ * kv_warp_bytes(Width, bits_k, bits_v, head_dim(), head_dim_v(), stages_);
        // kv_key_swizzle and kv_value_swizzle of a piece's row, without division; narrower rows are copied as they are
        key_mask_ = head_dim() == Width && row_bytes_k_ % 128 == 0 ? 4 : 0;
        key_shift_ = row_bytes_k_ == 256 ? 4 : 3;
        value_mask_ = head_dim_v() == Width && kv_value_permuted(row_bytes_v_) ? 6 : 0;
        value_shift_ = row_bytes_v_ == 256 ? 5 : row_bytes_v_ == 128 ? 4 : 3;
        wide_keys_ = ring_ + stages_ * stage_bytes();
        wide_values_ = wide_keys_ + (head_dim() == Width ? 0 : kv_step * Width * bits_k / 8);
    }

    BP_DEVICE void run() {
        const KvSpan span(args_, row_);
        const bool pages = split_ >= args_.dense_splits;
        if (pages)
            begin_pages(span);
        prepare_queries();
        sums_.clear();
        BP_UNROLL
        for (int j = 0; j < 2 * Tiles; ++j) {
            const int q = j / 2 * 8 + lane_ % 4 * 2 + j % 2, token = (first_query_ + q) % args_.tokens;
            sums_.factor[j] = factor_[q];
            sums_.from[j] = span.first_seen(token, args_.sliding_window);
            sums_.last[j] = span.first_new + token + BP_MUTATE(kv_sees_the_next, 1, 0);
        }
        if (pages)
            run_pages(span);
        else
            run_dense(span);
        sums_.finish();
        write(pages);
    }

  private:
    // Half pages first, first + warps, .. of this warp; the block's run ends at last_.
    BP_DEVICE void begin_pages(const KvSpan& span) {
        const int oldest = ptx::max(span.first_seen(0, args_.sliding_window) - span.dense[0], 0);
        const int from = oldest / kv_step, to = (span.pages + kv_step - 1) / kv_step;
        const int splits = args_.splits - args_.dense_splits, share = warps_ * splits;
        const int each = to > from ? (to - from + share - 1) / share * warps_ : 0;
        const int first = from + (split_ - args_.dense_splits) * each;
        last_ = ptx::min(first + each, to);
        begin_ = next_ = first + warp_;
        table_ = args_.block_table + static_cast<int64_t>(row_) * args_.table_row;
        next_page_ = next_ < last_ ? table_[next_ / 2] : 0;
        for (int stage = 0; stage < stages_ - 1; ++stage)
            fetch(ring_ + stage * stage_bytes());
    }

    // The warp's next half page on the way; an empty group behind the last.
    BP_DEVICE void fetch(uint8_t* stage) {
        if (next_ < last_) {
            const int64_t row =
                (static_cast<int64_t>(next_page_) * args_.kv_heads + head_) * kv_page + next_ % 2 * kv_step;
            copy<BitsK>(args_.k_codes, row, row_bytes_k_, key_shift_, 2, key_mask_, stage);
            copy<BitsV>(args_.v_codes, row, row_bytes_v_, value_shift_, 1, value_mask_,
                        stage + kv_step * row_bytes_k());
            if (lane_ < 8) {
                const uint16_t* gain = lane_ < 4 ? args_.k_gain : args_.v_gain;
                uint8_t* gains = stage + kv_step * (row_bytes_k() + row_bytes_v());
                ptx::cp_async16(gains + 16 * lane_, gain + row + lane_ % 4 * 8, true);
            }
            next_ += warps_;
            if (next_ < last_)
                next_page_ = table_[next_ / 2];
        }
        ptx::cp_async_commit();
    }

    // 32 rows, the first of which is `row`, in pieces of 16 bytes: piece i goes to place i ^ (i >> shift << left &
    // mask).
    template <int Bits>
    BP_DEVICE void copy(const uint8_t* codes, int64_t row, int row_bytes, int shift, int left, int mask, uint8_t* to) {
        const uint8_t* from = codes + row * (exact ? Width * Bits / 8 : row_bytes) + 16 * lane_;
        if constexpr (exact) {
            BP_UNROLL
            for (int k = 0; k < Width * Bits / 4; k += 32) {
                const int i = k + lane_;
                if (k + 32 <= Width * Bits / 4 || i < Width * Bits / 4)
                    ptx::cp_async16(to + 16 * (i ^ (i >> shift << left & mask)), from + 16 * k, true);
            }
        } else {
            for (int i = lane_; i < 2 * row_bytes; i += 32, from += 16 * 32)
                ptx::cp_async16(to + 16 * (i ^ (i >> shift << left & mask)), from, true);
        }
    }

    BP_DEVICE int head_dim() const { return exact ? Width : args_.head_dim; }
    BP_DEVICE int head_dim_v() const { return exact ? Width : args_.head_dim_v; }
    BP_DEVICE int row_bytes_k() const { return exact ? Width * BitsK / 8 : row_bytes_k_; }
    BP_DEVICE int row_bytes_v() const { return exact ? Width * BitsV / 8 : row_bytes_v_; }
    BP_DEVICE int stage_bytes() const { return kv_stage_bytes(row_bytes_k(), row_bytes_v()); }

    BP_DEVICE void wait() const {
        if (stages_ == 2)
            ptx::cp_async_wait<BP_MUTATE(kv_wait_off_by_one, 1, 0)>();
        else if (stages_ == 3)
            ptx::cp_async_wait<BP_MUTATE(kv_wait_off_by_one, 2, 1)>();
        else
            ptx::cp_async_wait<BP_MUTATE(kv_wait_off_by_one, 3, 2)>();
    }

    // Rows of queries to shared memory, rotated, scaled to a largest magnitude of 1 to 2, zeros beyond the last row.
    BP_DEVICE void prepare_queries() {
        for (int q = warp_; q < queries; q += warps_) {
            float* to = query_ + q * stride;
            const int r = first_query_ + q;
            const int64_t from = ((static_cast<int64_t>(row_) * args_.kv_heads + head_) * rows_ + r) * args_.head_dim;
            for (int i = lane_; i < Width; i += 32)
                to[i] = r < rows_ && i < args_.head_dim ? load(from + i) : 0.0f;
            ptx::sync_warp();
            if (args_.rotate_q)
                kv_rotate_row(to, args_.rotation_q);
            uint32_t largest = 0;
            for (int i = lane_; i < Width; i += 32)
                largest = ptx::max(largest, ptx::float_as_uint(to[i]) & 0x7fffffffu);
            largest = ptx::redux_max(largest);
            // 2^-e as a float, of numbers that are neither denormal nor beyond what has such an inverse
            const uint32_t exponent = ptx::min(ptx::max(largest >> 23, 1u), 253u);
            const float inverse = ptx::uint_as_float((254 - exponent) << 23);
            const bool finite = largest < 0x7f800000u;
            for (int i = lane_; i < Width; i += 32)
                to[i] = finite ? to[i] * inverse : 0.0f;
            if (lane_ == 0) // twice: products are with halves of levels
                factor_[q] = finite ? ptx::div(2 * args_.scale * kv_log2e, inverse) : ptx::uint_as_float(0x7fffffffu);
        }
        ptx::sync_threads();
    }

    BP_DEVICE float load(int64_t i) const {
        if (args_.q_dtype == Dtype::f32)
            return load_element<Dtype::f32>(args_.q, i);
        return args_.q_dtype == Dtype::f16 ? load_element<Dtype::f16>(args_.q, i)
                                           : load_element<Dtype::bf16>(args_.q, i);
    }

    BP_DEVICE void run_pages(const KvSpan& span) {
        uint32_t query[Width / 16][Tiles][2];
        kv_with_bits<BitsK>(args_.bits_k, [&](auto bits) { fragments<decltype(bits)::value>(query); });
        // what all queries see: the first new token's own position ends it, and the last one's window begins it
        const int seen_from = span.first_seen(args_.tokens - 1, args_.sliding_window);
        const int seen_to = ptx::min(span.first_new + 1, span.dense[0] + span.pages);
        const int end = span.dense[0] + span.pages;
        uint8_t *stage = ring_, *free_stage = ring_ + (stages_ - 1) * stage_bytes();
        uint8_t* const last_stage = free_stage;
        for (int step = begin_; step < last_; step += warps_) {
            wait();
            // what the other lanes copied is here, and what they read in the last round is free
            BP_MUTATE(kv_missing_sync_warp, , ptx::sync_warp());
            fetch(free_stage);
            const uint8_t* values = stage + kv_step * row_bytes_k();
            const uint16_t* gain = reinterpret_cast<const uint16_t*>(values + kv_step * row_bytes_v());
            const int first = span.dense[0] + step * kv_step;
            const bool all = first >= seen_from && first + kv_step <= seen_to;
            raise_unit(ptx::lds(gain + kv_step + lane_), first + lane_ < end);
            float score[2][Tiles][4] = {};
            const uint8_t* keys = stage;
            if constexpr (!exact)
                if (head_dim() != Width || head_dim_v() != Width)
                    widen(keys, values);
            kv_with_bits<BitsK>(args_.bits_k,
                                [&](auto bits) { kv_scores<decltype(bits)::value, Width, Tiles>(keys, query, score); });
            float key_gain[4], value_gain[4];
            int position[4];
            BP_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int token = lane_ / 4 + 8 * i;
                position[i] = first + token < end ? first + token : INT32_MAX;
                key_gain[i] = ptx::f16_to_float(ptx::lds(gain + token));
                value_gain[i] = ptx::f16_to_float(ptx::lds(gain + kv_step + token)) * inverse_unit_;
            }
            sums_.absorb(score, key_gain, value_gain, args_.softcap, position, all);
            uint32_t weight[2][Tiles][2];
            float rest[2][Tiles][4];
            kv_weights<Half>(score, weight, rest);
            kv_with_bits<BitsV>(args_.bits_v, [&](auto bits) {
                kv_outputs<decltype(bits)::value, Width, Tiles>(values, weight, sums_.out);
            });
            free_stage = stage;
            stage = stage == last_stage ? ring_ : stage + stage_bytes();
        }
        ptx::cp_async_wait<0>();
    }

    // Rows that are narrower than Width, as wide ones.
    BP_DEVICE void widen(const uint8_t*& keys, const uint8_t*& values) {
        if (args_.head_dim != Width) {
            kv_with_bits<BitsK>(args_.bits_k, [&](auto bits) {
                kv_widen<decltype(bits)::value, Width>(keys, args_.head_dim, wide_keys_, [](int row, int row_bytes) {
                    return kv_key_swizzle(row, row_bytes);
                });
            });
            keys = wide_keys_;
        }
        if (args_.head_dim_v != Width) {
            kv_with_bits<BitsV>(args_.bits_v, [&](auto bits) {
                kv_widen<decltype(bits)::value, Width>(
                    values, args_.head_dim_v, wide_values_,
                    [](int row, int row_bytes) { return kv_value_swizzle(row, row_bytes); });
            });
            values = wide_values_;
        }
        ptx::sync_warp();
    }

    template <int Bits>
    BP_DEVICE void fragments(uint32_t (&query)[Width / 16][Tiles][2]) const {
        using Row = KvRow<Bits, Width>;
        BP_UNROLL
        for (int step = 0; step < Width / 16; ++step)
            BP_UNROLL
        for (int tile = 0; tile < Tiles; ++tile)
            BP_UNROLL
        for (int pair = 0; pair < 2; ++pair) {
            const float* from = query_ + (8 * tile + lane_ / 4) * stride;
            query[step][tile][pair] = ptx::pack_f16x2(from[Row::query_element(lane_ % 4, step, pair, 0)],
                                                      from[Row::query_element(lane_ % 4, step, pair, 1)]);
        }
    }

    // Weights are relative to 2^(unit_ - 15), which is half of the largest gain of values so far or more.
    BP_DEVICE void raise_unit(uint16_t gain, bool there) {
        const uint32_t bits = there && gain < 0x7c00 ? gain : 0; // a gain of NaN has no size
        const int exponent = static_cast<int>(ptx::redux_max(bits) >> 10);
        if (exponent <= unit_)
            return;
        float by[2 * Tiles];
        BP_UNROLL
        for (int j = 0; j < 2 * Tiles; ++j)
            by[j] = power_of_two(unit_ - exponent);
        sums_.scale(by);
        unit_ = BP_MUTATE(kv_unit_is_forgotten, unit_, exponent);
        inverse_unit_ = power_of_two(15 - exponent);
    }
    BP_DEVICE static float power_of_two(int exponent) {
        return ptx::uint_as_float(static_cast<uint32_t>(127 + exponent) << 23);
    }

    BP_DEVICE void run_dense(const KvSpan& span) {
        const int share = args_.dense_splits * warps_ * kv_step;
        for (int base = (split_ * warps_ + warp_) * kv_step; base < span.dense_tokens(); base += share) {
            kv_dense_step(args_, span, row_, head_, base, query_, stride, sums_);
        }
    }

    // call(slot, its element) for all slots of the lane.
    template <class Call>
    BP_DEVICE void each_slot(bool pages, Call call) const {
        const int g = lane_ / 4;
        if (pages)
            kv_with_bits<BitsV>(args_.bits_v, [&](auto bits) {
                BP_UNROLL
                for (int slot = 0; slot < Width / 8; ++slot)
                    call(slot, KvRow<decltype(bits)::value, Width>::element(g, slot));
            });
        else
            BP_UNROLL
        for (int slot = 0; slot < Width / 8; ++slot)
            call(slot, kv_dense_element(g, slot));
    }

    // What the warps have, added up, to `parts`: output, greatest score, sum of weights.
    BP_DEVICE void write(bool pages) {
        constexpr int of_warp = queries * (Width + 2);
        float* results = reinterpret_cast<float*>(rings_);
        float* mine = results + warp_ * of_warp;
        BP_MUTATE(kv_missing_barrier, , ptx::sync_threads()); // rings are read no more
        const float unit = pages ? 2 * power_of_two(unit_ - 15) : 1.0f;
        each_slot(pages, [&](int slot, int element) {
            BP_UNROLL
            for (int j = 0; j < 2 * Tiles; ++j)
                mine[(j / 2 * 8 + lane_ % 4 * 2 + j % 2) * Width + element] =
                    sums_.out[slot / 2][j / 2][slot % 2 * 2 + j % 2] * unit;
        });
        if (lane_ < 4)
            BP_UNROLL
        for (int j = 0; j < 2 * Tiles; ++j) {
            const int q = j / 2 * 8 + lane_ * 2 + j % 2;
            mine[queries * Width + q] = sums_.most[j];
            mine[queries * (Width + 1) + q] = sums_.weight[j];
        }
        ptx::sync_threads();

        const int width = args_.head_dim_v, threads = 32 * warps_;
        const int64_t task = (static_cast<int64_t>(row_) * args_.kv_heads + head_) * args_.splits + split_;
        float* to = args_.parts + task * rows_ * (width + 2);
        const int count = ptx::min(queries, rows_ - first_query_);
        for (int i = static_cast<int>(ptx::thread()); i < count * width; i += threads) {
            const int q = i / width, d = i % width;
            float most = kv_least, sum = 0, weight = 0;
            for (int w = 0; w < warps_; ++w)
                most = ptx::max(most, results[w * of_warp + queries * Width + q]);
            for (int w = 0; w < warps_; ++w) {
                const float* of = results + w * of_warp;
                const float factor = ptx::exp2_approx(of[queries * Width + q] - most);
                sum += of[q * Width + d] * factor;
                weight += of[queries * (Width + 1) + q] * factor;
            }
            to[(first_query_ + q) * width + d] = sum;
            if (d == 0) {
                to[rows_ * width + first_query_ + q] = most;
                to[rows_ * (width + 1) + first_query_ + q] = weight;
            }
        }
    }

    const KvAttentionArgs& args_;
    KvSums<Width, Tiles> sums_;
    int warps_, stages_, lane_, warp_;
    int rows_; // of queries, of all blocks
    float* query_;
    float* factor_;
    uint8_t *rings_, *ring_, *wide_keys_, *wide_values_;
    int row_, head_, split_, first_query_;
    int row_bytes_k_, row_bytes_v_;
    int key_mask_, key_shift_, value_mask_, value_shift_;
    int begin_ = 0, next_ = 0, last_ = 0; // half pages
    const int32_t* table_ = nullptr;
    int32_t next_page_ = 0;
    int unit_ = 1;
    float inverse_unit_ = 16384;
};

template <int Width, int Tiles, int BitsK, int BitsV>
BP_GLOBAL void BP_LAUNCH_BOUNDS(32 * kv_most_warps, Width <= 128 && Tiles == 1 ? 3 : 2)
    kv_attention_kernel(const KvAttentionArgs args, int warps, int stages) {
    BP_DYNAMIC_SHARED(shared);
    KvAttention<Width, Tiles, BitsK, BitsV>(args, shared, warps, stages).run();
}

// 0 or a cudaError_t. std::invalid_argument where the sizes do not fit together. shared_limit: bytes that the device
// lets a block ask for.
int kv_attention(const KvAttentionArgs& args, int shared_limit, void* stream);

} // namespace bitpalette
