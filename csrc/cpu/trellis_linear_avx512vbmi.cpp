// The trellis kernel for AVX-512 with VNNI and VBMI: a register is four columns of eight rows, 16 bits each.
//
// Half a tile, eight rows, is m bytes. vpermb gives each 64-bit lane eight bytes of its row, from the one on in which
// the windows begin; of those, vpmultishiftqb takes four windows at any four bits, so that 32 windows cost one
// instruction and a quarter. Lane sums are rows: no sums across a register until the end. For row r = 1 of m = 20:
//
//     bit of the tile   16       24       32       40       48       56       64       72       80
//     lane 1            [ 2      ][ 3      ][ 4      ][ 5      ][ 6      ][ 7      ][ 8      ][ 9      ]
//     columns 0..3          20 21 22 23 (from 4, 5, 6, 7 of the lane), columns 4..7 from 9, 10, 11, 12, ...
//
// Eight bytes hold a row's windows up to m = 44 or so; above that they are fetched for columns 0..7 and again
// for 8..15. The two bytes after the tile's end are its first two.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // gcc 12's own avx512fintrin.h, hundreds of lines of it
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <cstring>

#include "trellis_linear_unit.h"

#if BITPALETTE_X86
#include <immintrin.h>

namespace bitpalette {
namespace {

constexpr int half_rows = 8, groups = 4; // of a tile's rows, of its columns
constexpr int register_bytes = 64;

// How the bytes of eight rows reach their lanes.
enum class Fetch {
    tile,  // m <= 32: from one load of the whole tile
    half,  // from a load of the half's bytes
    twice, // the same for columns 0..7 and for 8..15
    quads, // m > 64: eight rows' bytes do not fit a register, four rows' do
};

template <Fetch fetch>
constexpr int most_bytes = fetch == Fetch::tile    ? 64
                           : fetch == Fetch::quads ? 160
                                                   : 128; // of a tile

// Bytes that are asked for while a tile is decoded: from memory, on a Sapphire Rapids core at 2 and 4 bits, 21.5
// and 14.2 G weights/s; without asking 15.8 and 9.9, 2 KiB ahead 20.3 and 13.9, 8 KiB ahead 20.3.
constexpr int ahead = 4096;

struct alignas(register_bytes) FetchTable {
    uint8_t windows[groups][register_bytes]; // first bit of each byte of the windows of columns 4 g .. 4 g + 3
    uint8_t bytes[2][register_bytes];        // Fetch::tile: by half; else by columns 0..7, 8..15
    int begin[2][2];                         // [columns][rows 0..3, 4..7] of the loads, from the half's first byte
    uint64_t wrapped;                        // lanes of the second half's last load that hold the tile's first bytes
    int wrap;                                // the first of them
    Fetch fetch;
};

FetchTable fetch_table(TrellisCode code) {
    FetchTable table{};
    const int m = code.m;
    int latest = 0;
    for (int r = 0; r < half_rows; ++r)
        latest = latest > r * m % 8 ? latest : r * m % 8;
    const bool once = latest + code.offset(trellis_side - 1) + 16 <= 64;
    table.fetch = !once ? (m > 64 ? Fetch::quads : Fetch::twice) : m <= 32 ? Fetch::tile : Fetch::half;
    const int parts = once ? 1 : 2;
    const auto first_bit = [&](int r, int part) { return code.offset(trellis_side * r + 8 * part); };
    for (int part = 0; part < 2; ++part)
        for (int quad = 0; quad < 2; ++quad)
            table.begin[part][quad] = first_bit(table.fetch == Fetch::quads ? 4 * quad : 0, part) / 8;
    for (int r = 0; r < half_rows; ++r) {
        for (int i = 0; i < trellis_side; ++i) {
            const int from = first_bit(r, i * parts / trellis_side) / 8 * 8;
            const int bit = code.offset(trellis_side * r + i) - from;
            uint8_t* at = &table.windows[i / 4][r * 8 + i % 4 * 2];
            at[0] = static_cast<uint8_t>(bit);
            at[1] = static_cast<uint8_t>(bit + 8);
        }
        for (int b = 0; b < 8; ++b)
            for (int k = 0; k < 2; ++k) {
                const int byte = table.fetch == Fetch::tile ? (first_bit(r, 0) / 8 + b + k * m) % (2 * m)
                                                            : first_bit(r, k) / 8 + b - table.begin[k][r / 4];
                table.bytes[k][r * 8 + b] = static_cast<uint8_t>(byte);
            }
    }
    table.wrap = m - table.begin[parts - 1][1];
    table.wrapped = table.wrap < register_bytes ? uint64_t{3} << table.wrap : 0;
    return table;
}

const FetchTable& table_of(const TrellisCode& code) {
    static const struct All {
        FetchTable of[trellis_most_bits + 1];
        All() {
            for (int m = trellis_least_bits; m <= trellis_most_bits; ++m)
                of[m] = fetch_table({m, 16});
        }
    } all;
    return all.of[code.m];
}

__m512i load(const void* from) {
    return _mm512_loadu_si512(from);
}

// The bytes of the rows of both halves: [half][columns 0..7, 8..15], of which Fetch::tile and half have only the first.
template <Fetch fetch>
struct Sources {
    static constexpr int parts = fetch == Fetch::twice || fetch == Fetch::quads ? 2 : 1;
    __m512i at[2][parts];

    Sources(const uint8_t* tile, int m, const FetchTable& table, const __m512i* bytes) {
        if constexpr (fetch == Fetch::tile) {
            const __m512i whole = load(tile);
            at[0][0] = _mm512_permutexvar_epi8(bytes[0], whole);
            at[1][0] = _mm512_permutexvar_epi8(bytes[1], whole);
            return;
        }
        for (int half = 0; half < 2; ++half)
            for (int part = 0; part < parts; ++part) {
                const uint8_t* from = tile + half * m;
                constexpr int last = fetch == Fetch::quads ? 1 : 0;
                const bool wraps = half == 1 && part == parts - 1;
                __m512i end = load(from + table.begin[part][last]);
                if (wraps)
                    end = _mm512_mask_loadu_epi8(end, table.wrapped, tile - table.wrap);
                at[half][part] = _mm512_permutexvar_epi8(bytes[part], end);
                if constexpr (fetch == Fetch::quads)
                    at[half][part] = _mm512_mask_permutexvar_epi8(at[half][part], 0xFFFFFFFF, bytes[part],
                                                                  load(from + table.begin[part][0]));
            }
    }
};

// Four values of 16 bits, or eight of 8, for every row.
__m512i for_all_rows(const void* from) {
    long long value;
    std::memcpy(&value, from, sizeof value);
    return _mm512_set1_epi64(value);
}

// A row of tiles for T vectors.
template <Fetch fetch, int T, bool masked, bool bytes_twice>
void multiply_tiles(const TrellisWeight& w, const TrellisVectors& x, int64_t tile_row, float* out) {
    const FetchTable& table = table_of(w.code);
    const int m = w.code.m;
    const int64_t tile_bytes = w.code.bytes(), tiles = w.tiles();
    const uint8_t* tile = w.codes + tile_row * tiles * tile_bytes;
    // the last tile is read from a copy: loads go beyond its end
    alignas(register_bytes) uint8_t last[2 * trellis_most_bits + register_bytes] = {};
    std::memcpy(last, tile + (tiles - 1) * tile_bytes, static_cast<size_t>(tile_bytes));

    const __m512i bytes[2] = {load(table.bytes[0]), load(table.bytes[1])};
    const __m512i windows[groups] = {load(table.windows[0]), load(table.windows[1]), load(table.windows[2]),
                                     load(table.windows[3])};
    const __m512i low_factor = _mm512_set1_epi16(static_cast<int16_t>(0xD12D));
    const __m512i high_factor = _mm512_set1_epi16(static_cast<int16_t>(0x83DC));
    const __m512i ones = _mm512_set1_epi8(1);
    const __m512i mask = _mm512_set1_epi16(static_cast<int16_t>((1 << w.code.window) - 1));

    __m512 total[T][2]; // 64-bit lane: a row; its halves: columns 0 and 1, columns 2 and 3 of every four
    for (int t = 0; t < T; ++t)
        total[t][0] = total[t][1] = _mm512_setzero_ps();
    for (int64_t first = 0; first < tiles; first += trellis_block_tiles) {
        const int64_t block = first / trellis_block_tiles;
        constexpr int chains = bytes_twice ? 2 : 1; // one addition waits five cycles for the last
        __m512i sum[T][2][chains];
        for (int t = 0; t < T; ++t) {
            const int32_t* offset = x.offset + (t * x.blocks + block) * trellis_pairs;
            const int32_t start[2] = {offset[0] + offset[2] + offset[4] + offset[6],
                                      offset[1] + offset[3] + offset[5] + offset[7]};
            for (int half = 0; half < 2; ++half) {
                sum[t][half][0] = for_all_rows(start);
                if constexpr (chains == 2)
                    sum[t][half][1] = _mm512_setzero_si512();
            }
        }
        const int16_t* values = x.values + block * trellis_block;
        const int8_t* twice = bytes_twice ? x.twice + block * trellis_block * 2 : nullptr;
        const int64_t end = first + trellis_block_tiles < tiles ? first + trellis_block_tiles : tiles;
        for (int64_t c = first; c < end; ++c, values += trellis_side) {
            for (int line = 0; line < most_bytes<fetch>; line += register_bytes)
                _mm_prefetch(reinterpret_cast<const char*>(tile) + ahead + line, _MM_HINT_T0);
            const Sources<fetch> sources(c == tiles - 1 ? last : tile, m, table, bytes);
            tile += tile_bytes;
            for (int g = 0; g < groups; ++g)
                for (int half = 0; half < 2; ++half) {
                    const __m512i source = sources.at[half][g * Sources<fetch>::parts / groups];
                    __m512i state = _mm512_multishift_epi64_epi8(windows[g], source);
                    if constexpr (masked)
                        state = _mm512_and_si512(state, mask);
                    const __m512i low = _mm512_mullo_epi16(state, low_factor);
                    const __m512i high =
                        _mm512_add_epi16(_mm512_mulhi_epu16(state, low_factor), _mm512_mullo_epi16(state, high_factor));
                    if constexpr (bytes_twice) {
                        for (int t = 0; t < T; ++t) {
                            const __m512i a = for_all_rows(twice + t * x.row * 2 + g * 8);
                            sum[t][half][0] = _mm512_dpbusd_epi32(sum[t][half][0], low, a);
                            sum[t][half][1] = _mm512_dpbusd_epi32(sum[t][half][1], high, a);
                        }
                    } else {
                        const __m512i level =
                            _mm512_add_epi16(_mm512_maddubs_epi16(low, ones), _mm512_maddubs_epi16(high, ones));
                        for (int t = 0; t < T; ++t)
                            sum[t][half][0] =
                                _mm512_dpwssd_epi32(sum[t][half][0], level, for_all_rows(values + t * x.row + g * 4));
                    }
                }
            if constexpr (bytes_twice)
                twice += 2 * trellis_side;
        }
        for (int t = 0; t < T; ++t)
            for (int half = 0; half < 2; ++half) {
                __m512i all = sum[t][half][0];
                if constexpr (chains == 2)
                    all = _mm512_add_epi32(all, sum[t][half][1]);
                total[t][half] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(all), _mm512_set1_ps(x.scale[t * x.blocks + block]),
                                                 total[t][half]);
            }
    }
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    for (int t = 0; t < T; ++t)
        _mm512_storeu_ps(out + t * trellis_side, _mm512_add_ps(_mm512_permutex2var_ps(total[t][0], even, total[t][1]),
                                                               _mm512_permutex2var_ps(total[t][0], odd, total[t][1])));
}

// Masking is one instruction of eleven or more from three vectors on: not worth a second copy of the code.
template <Fetch fetch, int T>
void multiply_vectors(const TrellisWeight& w, const TrellisVectors& x, int64_t tile_row, float* sums) {
    if constexpr (T > 2) {
        multiply_tiles<fetch, T, true, false>(w, x, tile_row, sums);
    } else {
        const bool masked = w.code.window < 16;
        if (x.twice != nullptr)
            return masked ? multiply_tiles<fetch, T, true, true>(w, x, tile_row, sums)
                          : multiply_tiles<fetch, T, false, true>(w, x, tile_row, sums);
        masked ? multiply_tiles<fetch, T, true, false>(w, x, tile_row, sums)
               : multiply_tiles<fetch, T, false, false>(w, x, tile_row, sums);
    }
}

template <Fetch fetch>
constexpr TrellisMultiply multiply_of[trellis_most_vectors] = {
    multiply_vectors<fetch, 1>, multiply_vectors<fetch, 2>, multiply_vectors<fetch, 3>, multiply_vectors<fetch, 4>,
    multiply_vectors<fetch, 5>, multiply_vectors<fetch, 6>, multiply_vectors<fetch, 7>, multiply_vectors<fetch, 8>};

void multiply(const TrellisWeight& w, const TrellisVectors& x, int64_t tile_row, float* sums) {
    switch (table_of(w.code).fetch) {
    case Fetch::tile:
        return multiply_of<Fetch::tile>[x.n - 1](w, x, tile_row, sums);
    case Fetch::half:
        return multiply_of<Fetch::half>[x.n - 1](w, x, tile_row, sums);
    case Fetch::twice:
        return multiply_of<Fetch::twice>[x.n - 1](w, x, tile_row, sums);
    case Fetch::quads:
        return multiply_of<Fetch::quads>[x.n - 1](w, x, tile_row, sums);
    }
}

template <Fetch fetch>
void unpack_tiles(const TrellisWeight& w, int64_t tile_row, int64_t first, int64_t tiles, uint8_t* to) {
    const FetchTable& table = table_of(w.code);
    const int m = w.code.m;
    const int64_t tile_bytes = w.code.bytes();
    const uint8_t* row = w.codes + tile_row * w.tiles() * tile_bytes;
    // the last tile is read from a copy: loads go beyond its end
    alignas(register_bytes) uint8_t last[2 * trellis_most_bits + register_bytes] = {};
    std::memcpy(last, row + (w.tiles() - 1) * tile_bytes, static_cast<size_t>(tile_bytes));

    const __m512i bytes[2] = {load(table.bytes[0]), load(table.bytes[1])};
    const __m512i low_factor = _mm512_set1_epi16(static_cast<int16_t>(0xD12D));
    const __m512i high_factor = _mm512_set1_epi16(static_cast<int16_t>(0x83DC));
    const __m512i ones = _mm512_set1_epi8(1);
    const __m512i mask = _mm512_set1_epi16(static_cast<int16_t>((1 << w.code.window) - 1));
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    for (int64_t c = 0; c < tiles; ++c) {
        const uint8_t* tile = row + (first + c) * tile_bytes;
        for (int64_t line = 0; line < tile_bytes; line += register_bytes) // what is unpacked next
            _mm_prefetch(reinterpret_cast<const char*>(tile) + tiles * tile_bytes + line, _MM_HINT_T1);
        const Sources<fetch> sources(first + c == w.tiles() - 1 ? last : tile, m, table, bytes);
        for (int g = 0; g < groups; ++g, to += 2 * panel_step_bytes) {
            __m512i level[2];
            for (int half = 0; half < 2; ++half) {
                const __m512i source = sources.at[half][g * Sources<fetch>::parts / groups];
                const __m512i state =
                    _mm512_and_si512(_mm512_multishift_epi64_epi8(load(table.windows[g]), source), mask);
                const __m512i low = _mm512_mullo_epi16(state, low_factor);
                const __m512i high =
                    _mm512_add_epi16(_mm512_mulhi_epu16(state, low_factor), _mm512_mullo_epi16(state, high_factor));
                level[half] = _mm512_add_epi16(_mm512_maddubs_epi16(low, ones), _mm512_maddubs_epi16(high, ones));
            }
            // a 64-bit lane is a row of 8, with two pairs of columns
            _mm512_store_si512(to, _mm512_permutex2var_epi32(level[0], even, level[1]));
            _mm512_store_si512(to + panel_step_bytes, _mm512_permutex2var_epi32(level[0], odd, level[1]));
        }
    }
}

void unpack(const TrellisWeight& w, int64_t tile_row, int64_t first, int64_t tiles, const PanelUnit&, uint8_t* to) {
    switch (table_of(w.code).fetch) {
    case Fetch::tile:
        return unpack_tiles<Fetch::tile>(w, tile_row, first, tiles, to);
    case Fetch::half:
        return unpack_tiles<Fetch::half>(w, tile_row, first, tiles, to);
    case Fetch::twice:
        return unpack_tiles<Fetch::twice>(w, tile_row, first, tiles, to);
    case Fetch::quads:
        return unpack_tiles<Fetch::quads>(w, tile_row, first, tiles, to);
    }
}

} // namespace

const TrellisUnpack trellis_unpack_avx512vbmi = unpack;
const TrellisMultiply trellis_multiply_avx512vbmi = multiply;

} // namespace bitpalette
#endif
