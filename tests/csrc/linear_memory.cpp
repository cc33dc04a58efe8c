// Every kind of LinearWeight on memory of exactly its size, for a build with sanitizers: instruction sets against the
// scalar unit, that against rows as they are decoded.
#include <algorithm>
#include <functional>
#include <vector>

#include "cpu/codes.h"
#include "cpu/dense_weight.h"
#include "cpu/int8.h"
#include "cpu/trellis_linear.h"
#include "exact_block.h"

using namespace bitpalette;

namespace {

using Make = std::function<std::unique_ptr<LinearWeight>(Isa isa, InputForm form)>;

constexpr Dtype dtypes[] = {Dtype::f32, Dtype::f16, Dtype::bf16};
constexpr float unwritten = 12345.0f;

// What quantizing the input costs.
double bound_of(InputForm form) {
    return form == InputForm::f32 ? 1e-5 : form == InputForm::int16_by_256 ? 3e-4 : 0.03;
}

// Only trellis kernels have code of their own for VBMI.
std::vector<Isa> isas(bool with_vbmi) {
    std::vector<Isa> found;
    for (int i = 0; i < isa_count; ++i)
        if (isa_available(static_cast<Isa>(i)) && (with_vbmi || static_cast<Isa>(i) != Isa::avx512vbmi))
            found.push_back(static_cast<Isa>(i));
    return found; // scalar first
}

Exact<float> multiply(Isa isa, const LinearWeight& w, const Exact<unsigned char>& x, Dtype dtype, int64_t tokens,
                      bool block_by_block) {
    const int64_t gap = 3, row = w.out + gap;
    Exact<float> y(tokens * row - gap), dense(tokens * w.out);
    y.fill(unwritten);
    Activations input(isa); // a new one, whose buffers are not larger than they must be
    input.set(x.data(), dtype, tokens, w.in, nullptr, 1);
    if (block_by_block) {
        input.need(w.form());
        for (int64_t b = w.blocks() - 1; b >= 0; --b)
            w.multiply(input, y.data(), row, b, b + 1);
    } else {
        const LinearOutput output{&w, y.data(), row};
        linear_group(&output, 1, input, 1);
    }
    for (int64_t i = 0; i < y.size(); ++i)
        if ((i % row >= w.out) != (y[i] == unwritten))
            fail("output " + std::to_string(i) + " of rows of " + std::to_string(row) + " is " + std::to_string(y[i]));
        else if (i % row < w.out)
            dense[i / row * w.out + i % row] = y[i];
    return dense;
}

// Rows as the codec decodes them, the same on every instruction set.
Exact<float> decoded(const std::vector<Isa>& isas, const Make& make, InputForm form, const std::string& name) {
    Exact<float> first;
    for (const Isa isa : isas) {
        const auto w = make(isa, form);
        Exact<int64_t> index(w->out);
        Exact<float> rows(w->out * w->in);
        for (int64_t i = 0; i < w->out; ++i)
            index[i] = i;
        linear_rows(*w, index.data(), w->out, rows.data(), 1);
        if (isa == isas[0])
            first = std::move(rows);
        else
            expect_close(rows.data(), first.data(), rows.size(), 0, name + " rows on " + isa_name(isa));
    }
    return first;
}

void check(const std::string& name, bool with_vbmi, std::initializer_list<InputForm> forms, const Make& make,
           std::initializer_list<int64_t> counts) {
    static uint32_t calls = 0;
    Numbers numbers(++calls);
    const std::vector<Isa> all = isas(with_vbmi);
    for (const InputForm form : forms) {
        const Exact<float> rows = decoded(all, make, form, name);
        const auto scalar = make(Isa::scalar, form);
        const int64_t out = scalar->out, in = scalar->in;
        for (const int64_t tokens : counts) {
            const Dtype dtype = dtypes[(calls + static_cast<uint32_t>(tokens)) % 3];
            const Exact<float> values = numbers.floats(tokens * in);
            const Exact<unsigned char> x = numbers.elements(values.data(), tokens * in, dtype);
            for (int64_t i = 0; i < tokens * in; ++i) // as they are after rounding
                values[i] = load_element(x.data(), dtype, i);
            const std::string what =
                name + " form " + std::to_string(static_cast<int>(form)) + ", " + std::to_string(tokens) + " tokens";
            // many tokens go through panels, whose inputs may be quantized by other blocks of columns than for rows
            const auto panels = [tokens](const LinearWeight& w) {
                return w.panel() != nullptr && tokens >= w.panel()->fewest_tokens;
            };
            const Exact<float> y = multiply(Isa::scalar, *scalar, x, dtype, tokens, false);
            const Exact<float> by_blocks = multiply(Isa::scalar, *scalar, x, dtype, tokens, true);
            Exact<float> reference(tokens * out);
            for (int64_t t = 0; t < tokens; ++t)
                for (int64_t r = 0; r < out; ++r) {
                    double sum = 0;
                    for (int64_t j = 0; j < in; ++j)
                        sum += static_cast<double>(values[t * in + j]) * rows[r * in + j];
                    reference[t * out + r] = static_cast<float>(sum);
                }
            // an output may be near zero by chance: the norm is what x and W have
            const double norm = distance(values.data(), nullptr, tokens * in) *
                                distance(rows.data(), nullptr, out * in) / std::sqrt(static_cast<double>(in));
            // zero points are taken off in float32: what cancels leaves a rounding of what it was made of
            const double bound = bound_of(form) * norm + 1e-5 * distance(values.data(), nullptr, tokens * in);
            expect_close(y.data(), reference.data(), y.size(), bound, what + " against rows");
            for (const Isa isa : all) {
                const auto w = make(isa, form);
                const Exact<float> same = multiply(isa, *w, x, dtype, tokens, true);
                expect_close(same.data(), by_blocks.data(), y.size(), 1e-5 * norm,
                             what + " by blocks on " + isa_name(isa));
                const Exact<float> whole = multiply(isa, *w, x, dtype, tokens, false);
                if (!panels(*w)) {
                    expect_close(whole.data(), same.data(), y.size(), 0, what + " on " + isa_name(isa));
                    continue;
                }
                expect_close(whole.data(), reference.data(), y.size(), bound,
                             what + " by panels on " + isa_name(isa) + " against rows");
                if (panels(*scalar))
                    expect_close(whole.data(), y.data(), y.size(), 1e-5 * norm,
                                 what + " by panels on " + isa_name(isa));
            }
        }
    }
}

// Codes below `most` in the planes that codes.h draws; rows and columns beyond the weight's own have any code.
Exact<uint8_t> code_planes(Numbers& numbers, int64_t out, int64_t in, int bits, uint32_t most) {
    const int64_t tiles = (out + 15) / 16 * ((in + codes_tile_columns - 1) / codes_tile_columns);
    Exact<uint8_t> planes(tiles * bits * codes_plane_bytes);
    planes.fill(0);
    for (int64_t tile = 0; tile < tiles; ++tile)
        for (int quad = 0; quad < 8; ++quad)
            for (int i = 0; i < codes_plane_bytes; ++i) {
                uint32_t code = numbers.next() % most;
                int at = 0;
                for (const int width : {8, 4, 2, 1})
                    if ((bits & width) != 0) {
                        const int together = 8 / width, reg = at + quad / together;
                        const uint32_t part = (code & ((1u << width) - 1)) << width * (quad % together);
                        planes[(tile * bits + reg) * codes_plane_bytes + i] |= static_cast<uint8_t>(part);
                        code >>= width, at += width;
                    }
            }
    return planes;
}

std::string named(const char* kind, int64_t out, int64_t in, int bits, int64_t group) {
    return std::string(kind) + " " + std::to_string(out) + "x" + std::to_string(in) + " bits " + std::to_string(bits) +
           " group " + std::to_string(group);
}

void check_int(int64_t out, int64_t in, int bits, int64_t group, bool zero, std::initializer_list<int64_t> counts) {
    Numbers numbers(static_cast<uint32_t>(bits));
    const int64_t groups = group == 0 ? 1 : (in + group - 1) / group, parameters = (out + 15) / 16 * groups * 16;
    const Exact<uint8_t> codes = code_planes(numbers, out, in, bits, 1u << bits);
    const Exact<uint16_t> scale = numbers.scales(parameters, 0.05f);
    const Exact<uint8_t> zeros = numbers.bytes(parameters, 1u << bits);
    CodesParts parts{};
    parts.codes = codes.data(), parts.scale = scale.data(), parts.zero = zero ? zeros.data() : nullptr;
    parts.bits = bits, parts.out = out, parts.in = in, parts.group_size = group;
    check(
        named(zero ? "int with zeros" : "int", out, in, bits, group), false,
        {InputForm::int8_by_32, InputForm::int16_by_256, InputForm::f32},
        [&](Isa isa, InputForm form) { return std::make_unique<CodesWeight>(isa, form, parts); }, counts);
}

void check_lut(int64_t out, int64_t in, int entries, int64_t group, bool scaled, bool by_row,
               std::initializer_list<int64_t> counts) {
    Numbers numbers(static_cast<uint32_t>(entries));
    const int bits = entries <= 4 ? 2 : entries <= 8 ? 3 : 4, fourths = (entries + 3) / 4;
    const int64_t groups = group == 0 ? 1 : (in + group - 1) / group, padded = (out + 15) / 16 * 16;
    const float unit = 1.0f / 128; // bytes times this are exact in fp16
    const Exact<uint8_t> codes = code_planes(numbers, out, in, bits, static_cast<uint32_t>(entries));
    const Exact<uint16_t> scale = numbers.scales(padded * groups, 0.1f);
    const Exact<uint16_t> table((by_row ? out : 1) * entries);
    const Exact<uint8_t> bytes = numbers.bytes(by_row ? padded * fourths * 4 : 16);
    const Exact<float> units(by_row ? padded : 1);
    for (int64_t i = 0; i < units.size(); ++i)
        units.data()[i] = unit;
    for (int64_t i = 0; i < table.size(); ++i) {
        const int64_t row = i / entries, entry = i % entries; // byte of [block, fourth, 16 rows, 4]
        const int64_t at = by_row ? ((row / 16 * fourths + entry / 4) * 16 + row % 16) * 4 + entry % 4 : entry;
        table[i] = fp16_of_float(static_cast<float>(bytes[at] - 128) * unit);
    }
    CodesParts parts{};
    parts.codes = codes.data(), parts.scale = scaled ? scale.data() : nullptr;
    parts.table = table.data(), parts.table_bytes = bytes.data(), parts.table_unit = units.data();
    parts.table_by_row = by_row, parts.entries = entries, parts.bits = bits;
    parts.out = out, parts.in = in, parts.group_size = group;
    check(
        named(by_row ? "lut by row" : "lut", out, in, entries, group), false, {InputForm::int8_by_32, InputForm::f32},
        [&](Isa isa, InputForm form) { return std::make_unique<CodesWeight>(isa, form, parts); }, counts);
}

void check_int8(int64_t out, int64_t in, std::initializer_list<int64_t> counts) {
    Numbers numbers(8);
    const Exact<uint8_t> codes = numbers.bytes(out * in);
    const Exact<uint16_t> scale = numbers.scales(out, 0.01f);
    check(
        named("int8", out, in, 8, 0), false, {InputForm::int8_by_32, InputForm::int16_by_256, InputForm::f32},
        [&](Isa isa, InputForm form) {
            return std::make_unique<Int8Weight>(isa, form, codes.data(), scale.data(), out, in);
        },
        counts);
}

void check_dense(int64_t out, int64_t in, Dtype dtype, std::initializer_list<int64_t> counts) {
    Numbers numbers(9);
    const Exact<float> values = numbers.floats(out * in);
    const Exact<unsigned char> w = numbers.elements(values.data(), out * in, dtype);
    check(
        named("dense", out, in, static_cast<int>(dtype), 0), false, {InputForm::f32},
        [&](Isa isa, InputForm) { return std::make_unique<DenseWeight>(isa, w.data(), dtype, out, in); }, counts);
}

void check_trellis(int64_t out, int64_t in, TrellisCode code, std::initializer_list<int64_t> counts) {
    Numbers numbers(static_cast<uint32_t>(code.m));
    const Exact<uint8_t> codes = numbers.bytes((out + 15) / 16 * ((in + 15) / 16) * code.bytes());
    const Exact<uint16_t> scale = numbers.scales(out, 0.05f);
    check(
        named("trellis", out, in, code.m, code.window), true,
        {InputForm::int8_by_256, InputForm::int16_by_256, InputForm::f32},
        [&](Isa isa, InputForm form) {
            return std::make_unique<TrellisLinear>(isa, form, codes.data(), scale.data(), out, in, code);
        },
        counts);
}

constexpr int64_t groups[] = {0, 32, 64, 128};

} // namespace

int main() {
    for (int bits = 1; bits <= 8; ++bits)
        for (const bool zero : {false, true}) {
            const int64_t group = groups[(bits + zero) % 4], other = groups[(bits + zero + 1) % 4];
            check_int(1, 1, bits, group, zero, {1, 2, 9});
            check_int(17, 123, bits, group, zero, {1, 2, 7, 8, 9, 33});
            check_int(33, 257, bits, other, zero, {1, 9});
            check_int(48, 96, bits, 32, zero, {2, 8});
        }
    for (const int entries : {3, 4, 5, 8, 11, 16})
        for (const bool by_row : {false, true}) {
            const int64_t group = groups[(entries + by_row) % 4];
            check_lut(1, 1, entries, 0, by_row, by_row, {1, 2, 9});
            check_lut(17, 123, entries, group, true, by_row, {1, 2, 7, 8, 9, 33});
            check_lut(33, 257, entries, 0, false, by_row, {1, 9});
            check_lut(48, 96, entries, 32, true, by_row, {2, 8});
        }
    for (const auto& [out, in] : {std::pair{1, 1}, {17, 123}, {33, 257}, {3, 64}, {48, 100}}) {
        check_int8(out, in, {1, 2, 7, 8, 9, 33});
        for (const Dtype dtype : dtypes)
            check_dense(out, in, dtype, {1, 2, 7, 8, 9, 33});
    }
    constexpr int windows[] = {12, 14, 16};
    for (int m = trellis_least_bits; m <= trellis_most_bits; ++m) {
        check_trellis(17, 35, {m, windows[m % 3]}, {1, 2});
        if (m % 16 == 0 || m == 17 || m == 39) {
            check_trellis(17, 35, {m, 14}, {7, 8, 9, 33});
            check_trellis(1, 1, {m, 16}, {1, 7});
            check_trellis(33, 300, {m, 12}, {1, 7});
        }
    }
    std::printf("clean\n");
    return 0;
}
