// The code-plane kernel, written once over a vocabulary V of 16 lanes (a lane is an output row); each codes_<isa>.cpp
// defines V and includes this file.
//
// Everything is in an unnamed namespace and nothing of the standard library's templates is called: a function with
// external linkage compiled here with, say, AVX-512 could be the copy that the linker keeps for all.
#pragma once

#include <cstring>

#include "codes_levels.h"
#include "half.h"

namespace bitpalette {
namespace {

constexpr int tile_columns = codes_tile_columns;

// Blocks are read as streams side by side, each from its own part of the weight: on one core of a Sapphire Rapids four
// streams reach 96 % of the bandwidth of a loop that only reads, one stream 80 %, 4 bits. The hardware's own prefetcher
// stops at each 4 KiB page, so codes are asked for twice besides, ahead for the second level of cache and again for the
// first. Past the end of the weight that is harmless.
constexpr int near_bytes = 1024, far_bytes = 8192;
constexpr int parameters_ahead = 16; // groups

template <int bytes>
BITPALETTE_INLINE void prefetch_codes(const uint8_t* codes) {
    for (int line = 0; line < bytes; line += 64) {
        __builtin_prefetch(codes + near_bytes + line);
        __builtin_prefetch(codes + far_bytes + line, 0, 2);
    }
}

BITPALETTE_INLINE void prefetch_parameters(const CodesView& w, int64_t at) {
    if (w.scale != nullptr)
        __builtin_prefetch(w.scale + at + parameters_ahead * lanes);
    if (w.zero != nullptr)
        __builtin_prefetch(w.zero + at + parameters_ahead * lanes);
}

template <class V>
inline void store_rows(float* to, int64_t n, typename V::Floats sums) {
    if (n >= lanes) {
        V::store(to, sums);
        return;
    }
    alignas(64) float values[lanes];
    V::store(values, sums);
    std::memcpy(to, values, static_cast<size_t>(n) * sizeof(float));
}

inline float group_scale(const CodesView& w, int64_t block, int64_t group, int64_t r) {
    return w.scale == nullptr ? 1.0f : float_of_fp16(w.scale[(block * w.groups + group) * lanes + r]);
}

template <class V>
inline typename V::Table row_table(const CodesView& w, int64_t row) {
    alignas(64) float levels[16] = {};
    for (int i = 0; i < w.entries; ++i)
        levels[i] = float_of_fp16(w.row_tables[row * w.entries + i]);
    return V::load_table(levels);
}

template <class V>
void integer_starts(const CodesView& w, const CodesInput& x, int32_t* start) {
    const bool table = w.levels != nullptr || w.row_tables != nullptr;
    const int32_t doubled = !table && w.bits == 1 ? 2 : 1;
    const int32_t offset = table               ? V::table_offset
                           : w.zero != nullptr ? doubled
                                               : static_cast<int32_t>(w.offset * doubled);
    for (int64_t token = 0; token < x.tokens; ++token)
        for (int64_t tile = 0; tile < w.tiles; ++tile) {
            int32_t sum = 0;
            if (x.blocks.block == tile_columns) {
                sum = x.blocks.sum[token * (x.row / tile_columns) + tile];
            } else {
                const int64_t first = token * x.row + tile * tile_columns;
                int32_t low = 0;
                for (int i = 0; i < tile_columns; ++i) {
                    sum += x.blocks.codes[first + i];
                    low += x.blocks.low == nullptr ? 0 : x.blocks.low[first + i];
                }
                sum = x.blocks.low == nullptr ? sum : 256 * sum + low;
            }
            start[token * w.tiles + tile] = -offset * sum;
        }
}

inline void float_sums(const CodesView& w, const CodesInput& x, float* negative_sum) {
    for (int64_t token = 0; token < x.tokens; ++token)
        for (int64_t tile = 0; tile < w.tiles; ++tile) {
            const float* values = x.values + token * x.row + tile * tile_columns;
            float sums[8] = {};
            for (int i = 0; i < tile_columns; ++i)
                sums[i % 8] -= values[i];
            negative_sum[token * w.tiles + tile] =
                ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
        }
}

template <class V>
struct IntegerSums {
    typename V::Dot high, low; // low: of the second plane
};

// Quads k..7 of a tile of R blocks times M tokens.
template <class V, class Levels, int planes, int M, int R, int k>
BITPALETTE_INLINE void add_quads(const Levels (&levels)[R], const uint8_t* tile, int64_t stream, const int8_t* high,
                                 const int8_t* low, int64_t row, IntegerSums<V> (&sums)[R][M]) {
    for (int r = 0; r < R; ++r) {
        const typename V::Codes codes = levels[r].template quad<k>(tile + r * stream);
        for (int m = 0; m < M; ++m) {
            V::template add_products<Levels::top, k>(sums[r][m].high, codes, high + m * row + 4 * k);
            if constexpr (planes == 2)
                V::template add_products<Levels::top, k>(sums[r][m].low, codes, low + m * row + 4 * k);
        }
    }
    if constexpr (k < 7)
        add_quads<V, Levels, planes, M, R, k + 1>(levels, tile, stream, high, low, row, sums);
}

// R blocks of 16 rows, block, block + apart, ..., times M tokens in integers. Codes are loaded and taken apart once for
// all M, the input is loaded once for all R.
template <class V, class Levels, int planes, int M, int R>
void integer_blocks(const CodesView& w, const CodesInput& x, int64_t block, int64_t apart, int64_t token, float* y,
                    int64_t y_row) {
    const int64_t block_bytes = w.tiles * Levels::tile_bytes, stream = apart * block_bytes;
    const uint8_t* codes = w.codes + block * block_bytes;
    const int8_t* high = x.blocks.codes + token * x.row;
    const int8_t* low = planes == 2 ? x.blocks.low + token * x.row : nullptr;
    constexpr float unit = planes == 2 ? 1.0f / 256 : 1.0f; // of a whole number that two planes say
    constexpr int tiles_per_block = planes == 2 ? 8 : 1;    // of the input's scales: int16_by_256, int8_by_32
    const int64_t x_blocks = x.row / (tiles_per_block * tile_columns);
    Levels levels[R];
    typename V::Floats sums[R][M];
    for (int r = 0; r < R; ++r) {
        levels[r].load(w, block + r * apart);
        for (int m = 0; m < M; ++m)
            sums[r][m] = V::zero();
    }
    for (int64_t group = 0; group < w.groups; ++group) {
        typename V::Floats scale[R];
        typename V::Ints zero[R];
        for (int r = 0; r < R; ++r) {
            const int64_t parameters = ((block + r * apart) * w.groups + group) * lanes;
            prefetch_parameters(w, parameters);
            scale[r] = w.scale == nullptr ? V::all(1) : V::load_halves(w.scale + parameters);
            zero[r] = w.zero == nullptr ? V::integer(0) : V::load_bytes(w.zero + parameters);
        }
        const int64_t last = (group + 1) * w.tiles_per_group, end = last < w.tiles ? last : w.tiles;
        for (int64_t tile = group * w.tiles_per_group; tile < end; ++tile, codes += Levels::tile_bytes) {
            IntegerSums<V> tile_sums[R][M];
            for (int r = 0; r < R; ++r) {
                prefetch_codes<Levels::tile_bytes>(codes + r * stream);
                for (int m = 0; m < M; ++m) {
                    const int32_t start = x.start[(token + m) * w.tiles + tile];
                    const typename V::Ints first = w.zero == nullptr ? V::integer(start) : V::times(zero[r], start);
                    tile_sums[r][m].high = V::start(planes == 2 ? V::integer(0) : first);
                    if constexpr (planes == 2)
                        tile_sums[r][m].low = V::start(first);
                }
            }
            add_quads<V, Levels, planes, M, R, 0>(levels, codes, stream, high + tile * tile_columns,
                                                  low + tile * tile_columns, x.row, tile_sums);
            for (int m = 0; m < M; ++m) {
                const float by = unit * x.blocks.scale[(token + m) * x_blocks + tile / tiles_per_block];
                for (int r = 0; r < R; ++r) {
                    typename V::Ints sum = V::finish(tile_sums[r][m].high);
                    if constexpr (planes == 2)
                        sum = V::combined(sum, V::finish(tile_sums[r][m].low));
                    sums[r][m] = V::multiply_add(V::to_floats(sum), V::scaled(scale[r], by), sums[r][m]);
                }
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m)
            store_rows<V>(y + (token + m) * y_row + (block + r * apart) * lanes, w.out - (block + r * apart) * lanes,
                          Levels::has_factor ? V::multiply(sums[r][m], levels[r].factor()) : sums[r][m]);
}

// Columns from 4k + i of a tile times M tokens.
template <class V, class Levels, int M, int chains, int k, int i>
BITPALETTE_INLINE void add_columns(const Levels& levels, typename V::Codes codes, const float* x, int64_t row,
                                   typename V::Floats (&sums)[M][chains]) {
    const typename V::Floats level = levels.template level<i>(codes);
    for (int m = 0; m < M; ++m)
        sums[m][i % chains] = V::multiply_add(level, V::all(x[m * row + 4 * k + i]), sums[m][i % chains]);
    if constexpr (i < 3)
        add_columns<V, Levels, M, chains, k, i + 1>(levels, codes, x, row, sums);
}

template <class V, class Levels, int M, int chains, int k>
BITPALETTE_INLINE void add_float_quads(const Levels& levels, const uint8_t* tile, const float* x, int64_t row,
                                       typename V::Floats (&sums)[M][chains]) {
    add_columns<V, Levels, M, chains, k, 0>(levels, levels.template codes<k>(tile), x, row, sums);
    if constexpr (k < 7)
        add_float_quads<V, Levels, M, chains, k + 1>(levels, tile, x, row, sums);
}

// One block of 16 rows times M tokens in float32.
template <class V, class Levels, int M>
void float_block(const CodesView& w, const CodesInput& x, int64_t block, int64_t, int64_t token, float* y,
                 int64_t y_row) {
    constexpr int chains = M <= 2 ? 4 : M <= 4 ? 2 : 1; // independent sums that hide the latency of the additions
    Levels levels;
    levels.load(w, block);
    const uint8_t* codes = w.codes + block * w.tiles * Levels::tile_bytes;
    const float* values = x.values + token * x.row;
    typename V::Floats sums[M];
    for (int m = 0; m < M; ++m)
        sums[m] = V::zero();
    for (int64_t group = 0; group < w.groups; ++group) {
        const int64_t parameters = (block * w.groups + group) * lanes;
        prefetch_parameters(w, parameters);
        const typename V::Floats scale = w.scale == nullptr ? V::all(1) : V::load_halves(w.scale + parameters);
        const typename V::Floats zero =
            w.zero == nullptr ? V::all(w.offset) : V::to_floats(V::load_bytes(w.zero + parameters));
        const int64_t last = (group + 1) * w.tiles_per_group, end = last < w.tiles ? last : w.tiles;
        typename V::Floats group_sums[M][chains];
        for (int m = 0; m < M; ++m)
            for (int c = 0; c < chains; ++c)
                group_sums[m][c] = V::zero();
        for (int64_t tile = group * w.tiles_per_group; tile < end; ++tile, codes += Levels::tile_bytes) {
            prefetch_codes<Levels::tile_bytes>(codes);
            if (x.negative_sum != nullptr)
                for (int m = 0; m < M; ++m) {
                    const float sum = x.negative_sum[(token + m) * w.tiles + tile];
                    group_sums[m][0] = V::multiply_add(zero, V::all(sum), group_sums[m][0]);
                }
            add_float_quads<V, Levels, M, chains, 0>(levels, codes, values + tile * tile_columns, x.row, group_sums);
        }
        for (int m = 0; m < M; ++m) {
            for (int width = chains / 2; width > 0; width /= 2)
                for (int c = 0; c < width; ++c)
                    group_sums[m][c] = V::add(group_sums[m][c], group_sums[m][c + width]);
            sums[m] = V::multiply_add(group_sums[m][0], scale, sums[m]);
        }
    }
    for (int m = 0; m < M; ++m)
        store_rows<V>(y + (token + m) * y_row + block * lanes, w.out - block * lanes, sums[m]);
}

// One block of 16 rows with a table each times M tokens in float32. A lane is a column here: a register of 16 levels is
// one row's table.
template <class V, int bits, int M>
void row_table_block(const CodesView& w, const CodesInput& x, int64_t block, int64_t, int64_t token, float* y,
                     int64_t y_row) {
    const int64_t rows = w.out - block * lanes < lanes ? w.out - block * lanes : lanes;
    const float* values = x.values + token * x.row;
    for (int64_t r = 0; r < rows; ++r) {
        const typename V::Table table = row_table<V>(w, block * lanes + r);
        const uint8_t* codes = w.codes + block * w.tiles * Planes<V, bits>::bytes + 4 * r;
        typename V::Floats sums[M];
        for (int m = 0; m < M; ++m)
            sums[m] = V::zero();
        for (int64_t group = 0; group < w.groups; ++group) {
            const float scale = group_scale(w, block, group, r);
            const int64_t last = (group + 1) * w.tiles_per_group, end = last < w.tiles ? last : w.tiles;
            for (int64_t tile = group * w.tiles_per_group; tile < end; ++tile) {
                alignas(64) float levels[tile_columns];
                V::write_levels(V::template row_codes<bits>(codes + tile * Planes<V, bits>::bytes), table, scale,
                                levels);
                for (int m = 0; m < M; ++m)
                    for (int half = 0; half < tile_columns; half += lanes)
                        sums[m] = V::multiply_add(V::load(levels + half),
                                                  V::load(values + m * x.row + tile * tile_columns + half), sums[m]);
            }
        }
        for (int m = 0; m < M; ++m)
            y[(token + m) * y_row + block * lanes + r] = V::total(sums[m]);
    }
}

// Which of the kernels above runs for M tokens and R blocks of rows, R a power of two up to `side_by_side<M>`.
template <class V, class Levels, int planes>
struct InIntegers {
    static constexpr int most_tokens = V::most_tokens / planes;
    template <int M>
    static constexpr int side_by_side = V::most_sums / (M * planes);
    template <int M, int R>
    static constexpr auto blocks = integer_blocks<V, Levels, planes, M, R>;
};
template <class V, class Levels>
struct InFloats {
    static constexpr int most_tokens = V::most_tokens;
    template <int M>
    static constexpr int side_by_side = 1;
    template <int M, int R>
    static constexpr auto blocks = float_block<V, Levels, M>;
};
template <class V, int bits>
struct InFloatsByRow {
    static constexpr int most_tokens = V::most_tokens;
    template <int M>
    static constexpr int side_by_side = 1;
    template <int M, int R>
    static constexpr auto blocks = row_table_block<V, bits, M>;
};

// As many blocks side by side as registers hold for exactly M tokens; returns the first block that is left. Each of the
// R streams goes on from block to block, so that prefetching never runs out of what comes next.
template <class Kind, int M, int R>
int64_t multiply_side_by_side(const CodesView& w, const CodesInput& x, float* y, int64_t y_row, int64_t begin,
                              int64_t end) {
    if constexpr (R > 1 && M <= Kind::most_tokens) {
        if constexpr (R <= Kind::template side_by_side<M>) {
            const int64_t apart = (end - begin) / R;
            for (int64_t block = begin; block < begin + apart; ++block)
                Kind::template blocks<M, R>(w, x, block, apart, 0, y, y_row);
            begin += R * apart;
        }
        return multiply_side_by_side<Kind, M, R / 2>(w, x, y, y_row, begin, end);
    }
    return begin;
}

template <class Kind>
void multiply(const CodesView& w, const CodesInput& x, float* y, int64_t y_row, int64_t begin, int64_t end) {
    int64_t first = begin;
    if (x.tokens == 1)
        first = multiply_side_by_side<Kind, 1, 4>(w, x, y, y_row, begin, end);
    else if (x.tokens == 2)
        first = multiply_side_by_side<Kind, 2, 4>(w, x, y, y_row, begin, end);
    for (int64_t block = first; block < end; ++block) {
        int64_t token = 0;
        if constexpr (Kind::most_tokens >= 8)
            for (; token + 8 <= x.tokens; token += 8)
                Kind::template blocks<8, 1>(w, x, block, 1, token, y, y_row);
        if constexpr (Kind::most_tokens >= 4)
            for (; token + 4 <= x.tokens; token += 4)
                Kind::template blocks<4, 1>(w, x, block, 1, token, y, y_row);
        if constexpr (Kind::most_tokens >= 2)
            for (; token + 2 <= x.tokens; token += 2)
                Kind::template blocks<2, 1>(w, x, block, 1, token, y, y_row);
        for (; token < x.tokens; ++token)
            Kind::template blocks<1, 1>(w, x, block, 1, token, y, y_row);
    }
}

// write(codes, group, to) for each tile of a row.
template <class V, int bits, class Write>
BITPALETTE_INLINE void decode_tiles(const CodesView& w, int64_t row, float* to, const Write& write) {
    const int64_t block = row / lanes, r = row % lanes;
    const uint8_t* codes = w.codes + block * w.tiles * Planes<V, bits>::bytes + 4 * r;
    for (int64_t tile = 0; tile < w.tiles; ++tile) {
        const typename V::Row row_codes = V::template row_codes<bits>(codes + tile * Planes<V, bits>::bytes);
        const int64_t group = tile / w.tiles_per_group, first = tile * tile_columns;
        if (first + tile_columns <= w.in) {
            write(row_codes, group, to + first);
        } else {
            alignas(64) float last[tile_columns];
            write(row_codes, group, last);
            std::memcpy(to + first, last, static_cast<size_t>(w.in - first) * sizeof(float));
        }
    }
}

template <class V, int bits>
void decode_numbers(const CodesView& w, int64_t row, float* to) {
    const int64_t block = row / lanes, r = row % lanes;
    decode_tiles<V, bits>(w, row, to, [&](const typename V::Row& codes, int64_t group, float* at) {
        const float zero = w.zero == nullptr ? w.offset : w.zero[(block * w.groups + group) * lanes + r];
        V::write_numbers(codes, zero, group_scale(w, block, group, r), at);
    });
}

template <class V, int bits>
void decode_levels(const CodesView& w, int64_t row, float* to) {
    const typename V::Table table = w.levels != nullptr ? V::load_table(w.levels) : row_table<V>(w, row);
    decode_tiles<V, bits>(w, row, to, [&](const typename V::Row& codes, int64_t group, float* at) {
        V::write_levels(codes, table, group_scale(w, row / lanes, group, row % lanes), at);
    });
}

// Quads k..7 of a tile, a step of a panel each.
template <class V, class Levels, int k = 0>
BITPALETTE_INLINE void unpack_quads(const Levels& levels, const uint8_t* tile, uint8_t* to) {
    const typename V::Codes quad = levels.template quad<k>(tile);
    static_assert(sizeof quad == panel_step_bytes);
    std::memcpy(to + k * panel_step_bytes, &quad, sizeof quad);
    if constexpr (k < 7)
        unpack_quads<V, Levels, k + 1>(levels, tile, to);
}

template <class V, class Levels>
void unpack(const CodesView& w, int64_t block, int64_t begin, int64_t end, int span, const PanelBlock& to) {
    Levels levels;
    levels.load(w, block);
    const int64_t first = begin / tile_columns, last = end / tile_columns;
    const uint8_t* codes = w.codes + (block * w.tiles + first) * Levels::tile_bytes;
    for (int64_t tile = first; tile < last; ++tile, codes += Levels::tile_bytes) {
        // what is unpacked next: while this is multiplied there is time for it to come
        for (int line = 0; line < Levels::tile_bytes; line += 64)
            __builtin_prefetch(codes + (last - first) * Levels::tile_bytes + line, 0, 2);
        unpack_quads<V, Levels>(levels, codes, to.values + (tile - first) * tile_columns * lanes);
    }
    for (int64_t column = begin, s = 0; column < end; column += span, ++s) {
        const int64_t parameters = (block * w.groups + column / tile_columns / w.tiles_per_group) * lanes;
        const typename V::Floats scale = w.scale == nullptr ? V::all(1) : V::load_halves(w.scale + parameters);
        V::store(to.scale + s * lanes, Levels::has_factor ? V::multiply(scale, levels.factor()) : scale);
        if (w.zero != nullptr) {
            const typename V::Floats zero = V::to_floats(V::load_bytes(w.zero + parameters));
            V::store(to.offset + s * lanes, V::multiply(V::scaled(zero, -1), scale));
        }
    }
}

template <class V, int bits>
CodesFunctions functions_of(const CodesView& w, InputForm form) {
    CodesFunctions f{integer_starts<V>, float_sums, nullptr, unpack<V, Uniform<V, bits>>, decode_numbers<V, bits>};
    if constexpr (2 <= bits && bits <= 4)
        if (w.levels != nullptr || w.row_tables != nullptr) {
            const bool by_row = w.row_tables != nullptr;
            f.decode = decode_levels<V, bits>;
            f.unpack = by_row ? unpack<V, ByRow<V, bits>> : unpack<V, Shared<V, bits>>;
            if (form == InputForm::int8_by_32)
                f.multiply =
                    by_row ? multiply<InIntegers<V, ByRow<V, bits>, 1>> : multiply<InIntegers<V, Shared<V, bits>, 1>>;
            if (form == InputForm::f32)
                f.multiply = by_row ? multiply<InFloatsByRow<V, bits>> : multiply<InFloats<V, Shared<V, bits>>>;
            return f;
        }
    if (form == InputForm::int8_by_32)
        f.multiply = multiply<InIntegers<V, Uniform<V, bits>, 1>>;
    if (form == InputForm::int16_by_256)
        f.multiply = multiply<InIntegers<V, Uniform<V, bits>, 2>>;
    if (form == InputForm::f32)
        f.multiply = multiply<InFloats<V, Uniform<V, bits>>>;
    return f;
}

template <class V, int bits = 1>
CodesFunctions choose_functions(const CodesView& w, InputForm form) {
    if constexpr (bits < 8) {
        if (w.bits != bits)
            return choose_functions<V, bits + 1>(w, form);
    }
    return functions_of<V, bits>(w, form);
}

} // namespace
} // namespace bitpalette
