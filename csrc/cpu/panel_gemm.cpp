#include "panel_gemm.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#include "linear.h"
#include "parallel.h"

namespace bitpalette {
namespace {

constexpr std::align_val_t line{64};

// Of a tile's piece: it is read again for every block of tokens, from the first-level cache of 32 KiB or more.
constexpr int64_t piece_bytes = 16 << 10;

template <class T>
class Room {
  public:
    // Of at least n elements, which are not kept when it grows.
    T* of(int64_t n) {
        if (n > size_)
            at_.reset(static_cast<T*>(::operator new(static_cast<size_t>(n) * sizeof(T), line))), size_ = n;
        return at_.get();
    }

  private:
    struct Free {
        void operator()(T* at) const { ::operator delete(at, line); }
    };
    std::unique_ptr<T, Free> at_;
    int64_t size_ = 0;
};

template <class T>
void grow(std::vector<T>& buffer, int64_t n) {
    if (static_cast<int64_t>(buffer.size()) < n)
        buffer.resize(static_cast<size_t>(n));
}

int64_t round_up(int64_t n, int64_t to) {
    return (n + to - 1) / to * to;
}

// What is multiplied: as wide as the input, and bytes only as far as the instruction set has products of them.
PanelType multiplied(const PanelKind& kind) {
    if (kind.form == InputForm::f32)
        return PanelType::f32;
    const bool bytes = kind.top <= kind.unit->top_byte && kind.form != InputForm::int16_by_256;
    return kind.unpacked == PanelType::uint8 && !bytes ? PanelType::int16 : kind.unpacked;
}

PanelMultiply multiply_of(const PanelKind& kind) {
    const PanelType type = multiplied(kind);
    return type == PanelType::uint8   ? kind.unit->bytes
           : type == PanelType::int16 ? kind.unit->shorts
                                      : kind.unit->floats;
}

// One tile after another: its rooms are a thread's.
class Tiles {
  public:
    void run(const LinearWeight& w, const PanelInput& x, float* y, int64_t y_row, int64_t begin, int64_t end) {
        const PanelKind& kind = *w.panel();
        const PanelType type = multiplied(kind);
        const int64_t columns = round_up(w.in, panel_columns), rows = kind.unit->blocks * panel_rows;
        const int64_t per_step = panel_step_columns(type);
        const int64_t fitting = piece_bytes / (kind.unit->blocks * panel_step_bytes) * per_step;
        const int64_t most = std::max<int64_t>(fitting / kind.span, 1) * kind.span, spans = most / kind.span;
        const PanelMultiply multiply = multiply_of(kind);
        PanelPiece piece{};
        piece.span = kind.span;
        piece.values_block = most / per_step * panel_step_bytes;
        piece.scale_block = spans * panel_rows;
        uint8_t* values = values_.of(piece.values_block * kind.unit->blocks);
        float* scale = scale_.of(piece.scale_block * kind.unit->blocks);
        float* offset = offset_.of(piece.scale_block * kind.unit->blocks);
        float* sums = sums_.of(x.tokens() * rows);
        piece.values = values, piece.scale = scale, piece.offset = kind.has_offset ? offset : nullptr;
        for (int64_t tile = begin; tile < end; ++tile) {
            std::fill_n(sums, x.tokens() * rows, 0.0f);
            if (kind.unpacked == PanelType::f32)
                decode(w, tile);
            for (int64_t column = 0; column < columns; column += most) {
                piece.columns = std::min(most, columns - column);
                for (int b = 0; b < kind.unit->blocks; ++b)
                    unpack(w, kind, tile * kind.unit->blocks + b, column, piece.columns,
                           {values + b * piece.values_block, scale + b * piece.scale_block,
                            offset + b * piece.scale_block});
                for (int64_t block = 0; block < x.blocks(); ++block) {
                    x.fill(piece, block, column);
                    piece.sums = sums + x.first(block) * rows;
                    multiply(piece, static_cast<int>(x.first(block + 1) - x.first(block)));
                }
            }
            const int64_t row = tile * rows, n = std::min(rows, w.out - row);
            for (int64_t t = 0; t < x.tokens(); ++t)
                std::memcpy(y + t * y_row + row, sums + t * rows, static_cast<size_t>(n) * sizeof(float));
        }
    }

  private:
    void unpack(const LinearWeight& w, const PanelKind& kind, int64_t block, int64_t column, int64_t columns,
                const PanelBlock& to) {
        if (kind.unpacked == PanelType::f32) {
            const uint8_t* rows[panel_rows];
            for (int r = 0; r < panel_rows; ++r)
                rows[r] = reinterpret_cast<const uint8_t*>(decoded_.of(0)) +
                          4 * ((block % kind.unit->blocks * panel_rows + r) * round_up(w.in, panel_columns) + column);
            return kind.unit->interleave(rows, columns, to.values);
        }
        if (block >= w.blocks()) { // a tile's second block that the weight has not
            if (multiplied(kind) == PanelType::f32)
                std::fill_n(reinterpret_cast<float*>(to.values), columns * panel_rows, 0.0f);
            std::fill_n(to.scale, round_up(columns, kind.span) / kind.span * panel_rows, 0.0f);
            std::fill_n(to.offset, round_up(columns, kind.span) / kind.span * panel_rows, 0.0f);
            return;
        }
        if (multiplied(kind) == kind.unpacked)
            return w.unpack(block, column, column + columns, to);
        const int64_t per_step = panel_step_columns(kind.unpacked), steps = columns / per_step;
        uint8_t* narrow = narrow_.of(steps * panel_step_bytes);
        w.unpack(block, column, column + columns, {narrow, to.scale, to.offset});
        if (multiplied(kind) == PanelType::int16)
            return kind.unit->widen(narrow, steps, to.values);
        const auto widen = kind.unpacked == PanelType::uint8 ? kind.unit->bytes_to_floats : kind.unit->shorts_to_floats;
        for (int64_t done = 0; done < columns; done += kind.span) {
            const int64_t parameters = done / kind.span * panel_rows;
            widen(narrow + done / per_step * panel_step_bytes, std::min<int64_t>(kind.span, columns - done) / per_step,
                  kind.bias, to.scale + parameters, kind.has_offset ? to.offset + parameters : nullptr,
                  reinterpret_cast<float*>(to.values) + done * panel_rows);
        }
    }

    // The rows of a tile in float32; 0 beyond the weight's last row and column.
    void decode(const LinearWeight& w, int64_t tile) {
        const int64_t rows = w.panel()->unit->blocks * panel_rows, row = round_up(w.in, panel_columns);
        float* to = decoded_.of(rows * row);
        for (int64_t r = 0; r < rows; ++r, to += row) {
            const int64_t index = tile * rows + r, filled = index < w.out ? w.in : 0;
            if (filled > 0)
                w.decode(&index, 0, 1, to);
            std::fill(to + filled, to + row, 0.0f);
        }
    }

    Room<uint8_t> values_, narrow_;
    Room<float> scale_, offset_, sums_, decoded_;
};

} // namespace

const PanelUnit* panel_unit(Isa isa) {
#if BITPALETTE_AVXVNNI
    if (isa == Isa::avxvnni)
        return &panel_avxvnni;
#endif
#if BITPALETTE_X86
    if (plain_isa(isa) == Isa::avx512)
        return &panel_avx512;
    if (isa == Isa::avx2)
        return &panel_avx2;
#endif
    return isa == Isa::scalar ? &panel_scalar : nullptr;
}

void PanelInput::set(Activations& x, const PanelKind& kind, int threads) {
    x.need(kind.form, threads);
    kind_ = kind;
    tokens_ = x.tokens(), columns_ = round_up(x.in(), panel_columns);
    blocks_ = std::max<int64_t>((tokens_ + kind.unit->most_tokens - 1) / kind.unit->most_tokens, 1);
    spans_ = (columns_ + kind.span - 1) / kind.span;
    grow(words_, tokens_ * columns_ / panel_step_columns(multiplied(kind)));
    if (kind.form != InputForm::f32) {
        grow(start_, tokens_ * spans_);
        grow(scale_, tokens_ * spans_);
        grow(sum_, tokens_ * spans_);
    }
    struct Call {
        PanelInput& to;
        const Activations& x;
    } call{*this, x};
    const auto body = [](void* context, int64_t begin, int64_t end) {
        const Call& c = *static_cast<const Call*>(context);
        for (int64_t block = begin; block < end; ++block)
            c.to.order(c.x, block);
    };
    parallel_for(blocks_, threads, body, &call);
}

void PanelInput::order(const Activations& x, int64_t block) {
    thread_local std::vector<int16_t> shorts;
    const int64_t begin = first(block), n = first(block + 1) - begin;
    const PanelType type = multiplied(kind_);
    const int64_t steps = columns_ / panel_step_columns(type);
    uint32_t* to = words_.data() + begin * steps;
    const auto spread = [&](const void* values, int64_t i) {
        const auto* from = static_cast<const uint8_t*>(values);
        for (int64_t s = 0; s < steps; ++s)
            std::memcpy(to + s * n + i, from + 4 * s, 4);
    };
    if (kind_.form == InputForm::f32) {
        for (int64_t i = 0; i < n; ++i)
            spread(x.floats().values + (begin + i) * x.floats().row, i);
        return;
    }
    const Int8Blocks q = x.int8(kind_.form);
    const float unit = q.low == nullptr ? 1.0f : 1.0f / 256; // of a whole number that two planes say
    for (int64_t i = 0; i < n; ++i) {
        const int64_t token = begin + i;
        const int8_t *codes = q.codes + token * q.row, *low = q.low == nullptr ? nullptr : q.low + token * q.row;
        if (type == PanelType::uint8) {
            spread(codes, i);
        } else {
            grow(shorts, columns_);
            for (int64_t j = 0; j < columns_; ++j)
                shorts[static_cast<size_t>(j)] =
                    static_cast<int16_t>(low == nullptr ? codes[j] : codes[j] * 256 + low[j]);
            spread(shorts.data(), i);
        }
        for (int64_t s = 0; s < spans_; ++s) {
            const int64_t column = s * kind_.span, end = std::min(column + kind_.span, columns_);
            int32_t sum = 0, sum_low = 0;
            for (int64_t j = column; j < end; ++j)
                sum += codes[j];
            if (low != nullptr) {
                for (int64_t j = column; j < end; ++j)
                    sum_low += low[j];
                sum = sum * 256 + sum_low;
            }
            const float scale = unit * q.scale[(token * q.row + column) / q.block];
            const auto at = static_cast<size_t>(begin * spans_ + s * n + i);
            // what wraps around comes back in the sum of products: unsigned, where that is defined
            start_[at] = static_cast<int32_t>(0u - static_cast<uint32_t>(kind_.bias) * static_cast<uint32_t>(sum));
            scale_[at] = scale;
            sum_[at] = scale * static_cast<float>(sum);
        }
    }
}

void PanelInput::fill(PanelPiece& piece, int64_t block, int64_t column) const {
    const int64_t begin = first(block), n = first(block + 1) - begin;
    const int64_t per_step = panel_step_columns(multiplied(kind_));
    piece.x = reinterpret_cast<const uint8_t*>(words_.data() + begin * (columns_ / per_step) + column / per_step * n);
    if (kind_.form == InputForm::f32)
        return;
    const int64_t at = begin * spans_ + column / kind_.span * n;
    piece.start = start_.data() + at, piece.x_scale = scale_.data() + at, piece.x_sum = sum_.data() + at;
}

int64_t panel_tiles(const LinearWeight& w) {
    const int64_t rows = w.panel()->unit->blocks * panel_rows;
    return (w.out + rows - 1) / rows;
}

void panel_multiply(const LinearWeight& w, const PanelInput& x, float* y, int64_t y_row, int64_t begin, int64_t end) {
    thread_local Tiles tiles; // its rooms are kept from call to call
    tiles.run(w, x, y, y_row, begin, end);
}

} // namespace bitpalette
