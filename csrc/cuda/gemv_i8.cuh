// y = x W^T for a trellis weight and one or two tokens of int8 activations (transform_input.cuh makes them).
//
// A level is the sum of the four bytes of a product, less 510, so that a weight needs no conversion at all:
//
//     a * level = dp4a(state * 0x83DCD12D, a in all four bytes) - 510 a
//
// and the second term is one number a token, 510 times the sum of its activations. Sums are integers and exact: in 32
// bits over the columns of a warp, 16384 at most, then in 64. With two planes x = (code + low / 256) * scale.
//
// The superblocks of the matrix, those of a row of superblocks one after another, are dealt out to all blocks in equal
// runs, wherever rows begin and end; the warps of a block take every eighth of its run, each through a ring of stages
// of its own in shared memory, without a barrier. At the end of a row the warps' sums are added up. A row that several
// blocks share goes through `sums`: the last to arrive adds the others' sums. Which block is last does not matter,
// integers have no order of summation, so results are the same from run to run and for any number of blocks.
#pragma once

#include "container.cuh"
#include "elements.cuh"

namespace bitpalette {

constexpr int gemv_warps = 8;
constexpr int gemv_threads = 32 * gemv_warps;
constexpr int gemv_stages = 4; // three superblocks under way to each warp: 48 KiB an SM at 2 bits and 2 blocks
constexpr int gemv_most_tokens = 2;
constexpr int64_t gemv_most_columns = 16384 * gemv_warps; // 128 * 1020 * 16384 < 2^31

struct GemvI8Args {
    Container weight;     // of format trellis
    const int8_t* x;      // [tokens, KP] codes, the columns of every four in the order 0, 2, 1, 3, zeros from k on
    const int8_t* x_low;  // [tokens, KP] likewise, the second plane; or null
    const float* x_scale; // [tokens]
    const int32_t* x_sum; // [tokens], of codes; with two planes of 256 * code + low
    const void* bias;     // [n] of dtype, or null
    void* y;              // [tokens, y_stride] of dtype
    int64_t y_stride;     // elements
    int tokens;           // 1 or 2
    Dtype dtype;
    int blocks; // any number gives the same result; gemv_i8_resident_blocks is fastest
    // Calls that may run at the same time have sums and counters each.
    int64_t* sums;      // gemv_i8_sums of them
    unsigned* counters; // gemv_i8_counters of them, zero before the first call and after each
};

// Row r of superblocks has a counter of the blocks that have arrived, block b two slots of sums: for the row in which
// its run begins, and for the one in which it ends, where that is another.
BP_HOST_DEVICE constexpr int64_t gemv_i8_counters(int64_t n) {
    return (n + superblock - 1) / superblock;
}
BP_HOST_DEVICE constexpr int64_t gemv_i8_sums(int tokens, int blocks) {
    return static_cast<int64_t>(blocks) * 2 * superblock * tokens;
}

BP_HOST_DEVICE constexpr int gemv_tile_words(int row_bits) {
    return (row_bits + 1) / 2;
}
constexpr int gemv_stage_bytes(int tile_words, int vectors) {
    return superblock * tile_words + superblock * vectors;
}
// Rings, then two times the sums of the warps, then what the last block is told.
constexpr int gemv_shared_bytes(int tile_words, int vectors) {
    return gemv_warps * gemv_stages * gemv_stage_bytes(tile_words, vectors) +
           2 * gemv_warps * superblock * vectors * 4 + 16;
}

// TileWords: words of a tile, or 0 where they are known only at run time, which costs 11 % more instructions, for
// addresses. Vectors of int8: those of the tokens, with two planes [token][plane].
template <int TileWords, int Vectors>
class GemvI8 {
  public:
    BP_DEVICE GemvI8(const GemvI8Args& args, uint8_t* shared)
        : args_(args), across_(static_cast<int>((args.weight.k + superblock - 1) / superblock)),
          total_((args.weight.n + superblock - 1) / superblock * across_), lane_(static_cast<int>(ptx::lane())),
          warp_(static_cast<int>(ptx::warp())) {
        tile_words_ = ptx::keep(gemv_tile_words(args.weight.row_bits));
        planes_ = args.x_low == nullptr ? 1 : 2;
        stage_bytes_ = superblock * tile_words() + superblock * Vectors;
        ring_ = shared + ptx::keep(warp_ * gemv_stages * stage_bytes_);
        sums_ = reinterpret_cast<int32_t*>(shared + gemv_warps * gemv_stages * stage_bytes_);
        last_ = reinterpret_cast<unsigned*>(sums_ + 2 * gemv_warps * superblock * Vectors);
        const int m = args.weight.row_bits, start = lane_ % 4 * m / 4; // of the lane's columns, in a row
        BP_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int bit = (half * 8 + lane_ / 4) * m + start;
            word_[half] = bit / 32;
            shift_[half] = bit % 32;
        }
        next_ = word_[1] + 1 == tile_words() ? 0 : word_[1] + 1; // the tile is a circle
        BP_UNROLL
        for (int j = 0; j < 3; ++j)
            window_[j] = (lane_ % 4 * 4 + j + 1) * m / 16 - start;
        mask_ = (1u << args.weight.window) - 1;
        row_bytes_ = across_ * superblock;
        step_ = ptx::keep(gemv_warps % across_ * superblock);
        to_ = ptx::keep(16 * lane_);
        pieces_ = ptx::keep(4 * tile_words() - lane_);
    }

    BP_DEVICE void run() {
        const int64_t begin = first_of(ptx::block()), length = first_of(ptx::block() + 1) - begin;
        begin_fetching(begin + warp_, static_cast<int>(length) - warp_);
        uint8_t* stage = ring_;
        for (; stage < ring_ + (gemv_stages - 1) * stage_bytes_; stage += stage_bytes_)
            fetch(stage);
        uint8_t *const last_stage = stage, *free_stage = stage;
        stage = ring_;
        int parity = 0, at = warp_; // of the run
        int64_t row = begin / across_;
        for (int64_t first = begin; first < begin + length; ++row, parity ^= BP_MUTATE(gemv_one_buffer, 0, 1)) {
            const int64_t row_end = (row + 1) * across_;
            const int64_t last = row_end < begin + length ? row_end : begin + length;
            int32_t sum[Vectors][8] = {};
            for (const int until = ptx::keep(static_cast<int>(last - begin)); at < until; at += gemv_warps) {
                ptx::cp_async_wait<BP_MUTATE(gemv_wait_off_by_one, gemv_stages - 1, gemv_stages - 2)>();
                // what the other lanes copied is here, and what they read in the last round is free
                BP_MUTATE(gemv_missing_sync_warp, , ptx::sync_warp());
                fetch(free_stage);
                add(stage, sum);
                free_stage = stage;
                stage = stage == last_stage ? ring_ : stage + stage_bytes_;
            }
            finish(row, first == begin, last - first == across_, sum, parity);
            first = last;
        }
        ptx::cp_async_wait<0>();
    }

  private:
    BP_DEVICE int tokens() const { return Vectors / planes_; }
    BP_DEVICE int tile_words() const { return TileWords != 0 ? TileWords : tile_words_; }

    // The run of block b begins here.
    BP_DEVICE int64_t first_of(unsigned b) const { return total_ * b / static_cast<int64_t>(ptx::blocks()); }
    // The block in whose run a superblock is: the last b with first_of(b) <= superblock.
    BP_DEVICE int64_t owner(int64_t superblock_index) const {
        return ((superblock_index + 1) * static_cast<int64_t>(ptx::blocks()) - 1) / total_;
    }

    // From superblock `first` on every eighth, as long as they are less than `length` away.
    BP_DEVICE void begin_fetching(int64_t first, int length) {
        to_fetch_ = length;
        codes_ = reinterpret_cast<const uint8_t*>(args_.weight.codes) + first * superblock * tile_words() + 16 * lane_;
        const int vector = lane_ / 4 < Vectors ? lane_ / 4 : 0;
        x_ = vector % planes_ == 0 ? args_.x : args_.x_low;
        const int begin = vector / planes_ * row_bytes_ + lane_ % 4 * 16;
        x_end_ = ptx::keep(begin + row_bytes_);
        x_at_ = begin + static_cast<int>(first % across_) * superblock;
    }

    // The warp's next superblock and its columns of x on the way; an empty group behind the last.
    BP_DEVICE void fetch(uint8_t* stage) {
        if (to_fetch_ > 0) {
            constexpr int most = 4 * (TileWords != 0 ? TileWords : gemv_tile_words(80)); // pieces of 16 bytes
            constexpr int least = 4 * (TileWords != 0 ? TileWords : gemv_tile_words(16));
            uint8_t* to = stage + to_;
            BP_UNROLL
            for (int i = 0; i < most; i += 32)
                if (i + 32 <= least || i < pieces_)
                    ptx::cp_async16_once(to + 16 * i, codes_ + 16 * i, true);
            if (lane_ < 4 * Vectors)
                ptx::cp_async16(to + superblock * tile_words(), x_ + x_at_, true);
            to_fetch_ -= gemv_warps;
            codes_ += gemv_warps * superblock * tile_words();
            x_at_ += step_;
            x_at_ -= x_at_ < x_end_ ? 0 : row_bytes_;
        }
        ptx::cp_async_commit();
    }

    // sum[v][2 n16 + half]: of the lane's columns of rows 16 n16 + 8 half + lane / 4.
    BP_DEVICE void add(const uint8_t* stage, int32_t (&sum)[Vectors][8]) const {
        const uint32_t* codes = reinterpret_cast<const uint32_t*>(stage);
        const uint32_t* x = codes + 16 * tile_words() + lane_ % 4;
        BP_UNROLL
        for (int k16 = 0; k16 < 4; ++k16) {
            int32_t splat[Vectors][4];
            BP_UNROLL
            for (int v = 0; v < Vectors; ++v) {
                const uint32_t four = ptx::lds(x + 16 * v + 4 * k16); // columns 0, 2, 1, 3
                splat[v][0] = static_cast<int32_t>(ptx::prmt(four, 0, 0x0000));
                splat[v][1] = static_cast<int32_t>(ptx::prmt(four, 0, 0x2222));
                splat[v][2] = static_cast<int32_t>(ptx::prmt(four, 0, 0x1111));
                splat[v][3] = static_cast<int32_t>(ptx::prmt(four, 0, 0x3333));
            }
            BP_UNROLL
            for (int n16 = 0; n16 < 4; ++n16) {
                const uint32_t* tile = codes + (4 * n16 + k16) * tile_words();
                BP_UNROLL
                for (int half = 0; half < 2; ++half) {
                    // the windows of the lane's four columns: the last begins 15 bits behind the first at most
                    // row g's 32 bits never end in the tile's first word
                    const uint32_t* next = half == 0 ? tile + word_[0] + 1 : tile + next_;
                    const uint32_t bits = ptx::funnel_right(ptx::lds(tile + word_[half]), ptx::lds(next), shift_[half]);
                    BP_UNROLL
                    for (int j = 0; j < 4; ++j) {
                        const uint32_t state = (j == 0 ? bits : bits >> window_[j - 1]) & mask_;
                        const uint32_t bytes = state * trellis_multiplier;
                        BP_UNROLL
                        for (int v = 0; v < Vectors; ++v)
                            sum[v][2 * n16 + half] = ptx::dp4a_us(bytes, splat[v][j], sum[v][2 * n16 + half]);
                    }
                }
            }
        }
    }

    // All warps: what they have of a row of superblocks, to y or to `sums`. begins: the run begins in this row;
    // whole: the block has all of it.
    // The sums of the next row go elsewhere (parity), so one barrier is enough between writing and reading them.
    BP_DEVICE void finish(int64_t row, bool begins, bool whole, int32_t (&sum)[Vectors][8], int parity) {
        int32_t* sums = sums_ + parity * gemv_warps * superblock * Vectors;
        BP_UNROLL
        for (int v = 0; v < Vectors; ++v)
            BP_UNROLL
        for (int i = 0; i < 8; ++i) {
            uint32_t part = static_cast<uint32_t>(sum[v][i]);
            part += ptx::shfl_xor(part, 1);
            part += ptx::shfl_xor(part, 2);
            if (lane_ % 4 == 0)
                sums[(warp_ * Vectors + v) * superblock + 8 * i + lane_ / 4] = static_cast<int32_t>(part);
        }
        ptx::sync_threads();
        const int thread = static_cast<int>(ptx::thread()), token = thread / superblock, at = thread % superblock;
        int64_t value = 0;
        if (token < tokens()) {
            for (int p = 0; p < planes_; ++p) {
                int64_t plane = 0;
                for (int warp = 0; warp < gemv_warps; ++warp)
                    plane += sums[(warp * Vectors + token * planes_ + p) * superblock + at];
                value = 256 * value + plane; // high, then low
            }
        }
        if (!whole && !gathered(row, begins, token, at, value))
            return;
        const int64_t n = row * superblock + at;
        if (token < tokens() && n < args_.weight.n)
            write(token, n, value);
    }

    BP_DEVICE int64_t* slot(int64_t b, bool begins, int token) const {
        int64_t* slots = args_.sums;
        return slots + ((2 * b + (begins ? 0 : 1)) * tokens() + token) * superblock;
    }

    // Leaves the block's sums for the others. True in the last block to come: value is then the sum of all.
    BP_DEVICE bool gathered(int64_t row, bool begins, int token, int at, int64_t& value) {
        const int64_t first = owner(row * across_), count = owner((row + 1) * across_ - 1) - first + 1;
        if (token < tokens())
            slot(ptx::block(), begins, token)[at] = value;
        ptx::fence();
        ptx::sync_threads();
        unsigned* counter = args_.counters + row;
        if (ptx::thread() == 0)
            *last_ = ptx::atomic_add(counter, 1) + 1 == static_cast<unsigned>(count);
        ptx::sync_threads();
        if (*last_ == 0)
            return false;
        ptx::fence();
        if (ptx::thread() == 0)
            ptx::st_release(counter, BP_MUTATE(gemv_counter_left, 1, 0));
        value = 0;
        if (token < tokens())
            for (int64_t b = first; b < first + count; ++b) // all but the first begin in this row
                value += slot(b, b > first || first_of(static_cast<unsigned>(b)) == row * across_, token)[at];
        return true;
    }

    BP_DEVICE void write(int token, int64_t n, int64_t value) const {
        const float exact = static_cast<float>(value - trellis_centre * static_cast<int64_t>(args_.x_sum[token]));
        const float x = ptx::mul(exact, args_.x_scale[token] * (planes_ == 2 ? 1.0f / 256 : 1.0f));
        const float scale = ptx::f16_to_float(args_.weight.scale[n]) * trellis_unit;
        const int64_t to = token * args_.y_stride + n;
        if (args_.dtype == Dtype::f32)
            write_as<Dtype::f32>(to, n, x, scale);
        else if (args_.dtype == Dtype::f16)
            write_as<Dtype::f16>(to, n, x, scale);
        else
            write_as<Dtype::bf16>(to, n, x, scale);
    }

    template <Dtype D>
    BP_DEVICE void write_as(int64_t to, int64_t n, float x, float scale) const {
        const float bias = args_.bias == nullptr ? 0.0f : load_element<D>(args_.bias, n);
        store_element<D>(args_.y, to, ptx::fma(x, scale, bias));
    }

    const GemvI8Args& args_;
    int across_;    // superblocks in a row
    int64_t total_; // and in all
    int lane_, warp_, stage_bytes_;
    int tile_words_;
    int planes_; // 1 or 2
    uint8_t* ring_;
    int32_t* sums_; // [2][warp][vector][row]
    unsigned* last_;
    int word_[2], next_; // of a tile: where the lane's windows of rows g and g + 8 begin; where the latter's end
    int shift_[2], window_[3];
    uint32_t mask_;
    const uint8_t* codes_; // what is fetched next: this lane's 16 bytes of the codes
    const int8_t* x_;      // and of its vector of x, from
    int x_at_, x_end_;     // here on; where a row ends
    int step_, row_bytes_; // of x: from fetch to fetch, and all columns
    int to_fetch_;         // superblocks as far as the end of the run
    int to_, pieces_;      // in a stage; 16 bytes of codes from there on
};

template <int TileWords, int Vectors>
BP_GLOBAL void BP_LAUNCH_BOUNDS(gemv_threads, Vectors == 1 ? 3 : 2) gemv_i8_kernel(const GemvI8Args args) {
    BP_DYNAMIC_SHARED(shared);
    GemvI8<TileWords, Vectors>(args, shared).run();
}

// 0 or a cudaError_t. std::invalid_argument where the sizes do not fit together.
int gemv_i8(const GemvI8Args& args, void* stream);

// How many blocks of the kernel the device holds at once. 0 or a cudaError_t.
int gemv_i8_resident_blocks(int row_bits, int tokens, bool planes, int* blocks);

} // namespace bitpalette
