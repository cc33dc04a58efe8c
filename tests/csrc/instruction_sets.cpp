// Every kernel on every instruction set of this machine against the scalar one, on random weights of awkward sizes.
//
// Needs neither Python nor torch, so that it can be cross-compiled and run by an emulator. What a kernel reads lies in
// blocks of exactly its size, for builds with AddressSanitizer. Prints the first differences and the instruction sets
// that were compared; the exit code says whether there were any differences.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "cpu/activations.h"
#include "cpu/attention_decode.h"
#include "cpu/bandwidth.h"
#include "cpu/codes.h"
#include "cpu/dense_weight.h"
#include "cpu/half.h"
#include "cpu/input_transform.h"
#include "cpu/int8.h"
#include "cpu/kv_append.h"
#include "cpu/kv_attention.h"
#include "cpu/kv_cache.h"
#include "cpu/linear.h"
#include "cpu/trellis_encode.h"
#include "cpu/trellis_linear.h"
#include "cpu/vector_math.h"

using namespace bitpalette;

namespace {

constexpr int64_t token_counts[] = {1, 2, 7, 8, 9};
constexpr int64_t most_tokens = 9;

int compared = 0, different = 0;

void report(Isa isa, const std::string& what, const std::string& how) {
    if (++different <= 20)
        std::printf("%s, %s: %s\n", isa_name(isa), what.c_str(), how.c_str());
}

// A block of exactly n elements.
template <class T>
using Block = std::unique_ptr<T[]>;

struct Random {
    uint32_t state = 1;

    uint32_t bits() {
        state = state * 1664525 + 1013904223;
        return state >> 8;
    }
    float number() { return static_cast<float>(bits()) / (1 << 23) - 1; }
    Block<float> floats(int64_t n) {
        Block<float> x(new float[static_cast<size_t>(n)]);
        for (int64_t i = 0; i < n; ++i)
            x[static_cast<size_t>(i)] = number();
        return x;
    }
    Block<uint8_t> bytes(int64_t n) {
        Block<uint8_t> x(new uint8_t[static_cast<size_t>(n)]);
        for (int64_t i = 0; i < n; ++i)
            x[static_cast<size_t>(i)] = static_cast<uint8_t>(bits());
        return x;
    }
    // 0.5 to 1.5, as scales are positive
    Block<uint16_t> halves(int64_t n) {
        Block<uint16_t> x(new uint16_t[static_cast<size_t>(n)]);
        for (int64_t i = 0; i < n; ++i)
            x[static_cast<size_t>(i)] = fp16_of_float(1 + 0.5f * number());
        return x;
    }
};

bool same(float a, float b) {
    return std::memcmp(&a, &b, sizeof a) == 0 || (std::isnan(a) && std::isnan(b));
}

template <class T>
bool same(T a, T b) {
    return a == b;
}

template <class T>
void expect_same(Isa isa, const std::string& what, const T* got, const T* want, int64_t n) {
    ++compared;
    for (int64_t i = 0; i < n; ++i)
        if (!same(got[i], want[i])) {
            report(isa, what,
                   "element " + std::to_string(i) + " is " + std::to_string(got[i]) + ", not " +
                       std::to_string(want[i]));
            return;
        }
}

// |got - want| <= bound * size_i; written so that NaN fails.
void expect_close(Isa isa, const std::string& what, const float* got, const float* want, int64_t n, float bound,
                  const std::function<float(int64_t)>& size) {
    ++compared;
    for (int64_t i = 0; i < n; ++i)
        if (!(std::fabs(got[i] - want[i]) <= bound * size(i))) {
            report(isa, what,
                   "element " + std::to_string(i) + " is " + std::to_string(got[i]) + ", not " +
                       std::to_string(want[i]));
            return;
        }
}

// x [tokens, in] of another type, as bits.
Block<uint16_t> rounded(const float* x, int64_t n, Dtype dtype) {
    Block<uint16_t> to(new uint16_t[static_cast<size_t>(n)]);
    for (int64_t i = 0; i < n; ++i)
        store_element(to.get(), dtype, i, x[i]);
    return to;
}

// ---- inputs

void compare_activations(Isa isa) {
    Random random;
    for (const int64_t in : {1, 17, 123, 256, 577, 1537}) {
        const std::string what = "activations of " + std::to_string(in);
        Block<float> x = random.floats(3 * in);
        x[static_cast<size_t>(in / 2)] = 1000; // an outlier, a block that is not finite, one that vanishes
        if (in > 577) {
            x[600] = std::numeric_limits<float>::infinity();
            x[static_cast<size_t>(in + 300)] = std::numeric_limits<float>::quiet_NaN();
            std::fill_n(x.get() + 2 * in, 256, 1e-40f);
        }
        for (const Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16}) {
            const Block<uint16_t> half = rounded(x.get(), 3 * in, dtype == Dtype::f32 ? Dtype::f16 : dtype);
            const void* from = dtype == Dtype::f32 ? static_cast<const void*>(x.get()) : half.get();
            Activations got(isa), want(Isa::scalar);
            got.set(from, dtype, 3, in, nullptr);
            want.set(from, dtype, 3, in, nullptr);
            const int64_t row = want.floats().row;
            expect_same(isa, what, got.floats().values, want.floats().values, 3 * row);
            for (const InputForm form : {InputForm::int8_by_32, InputForm::int8_by_256, InputForm::int16_by_256}) {
                got.need(form);
                want.need(form);
                const Int8Blocks a = got.int8(form), b = want.int8(form);
                expect_same(isa, what + ", codes", a.codes, b.codes, 3 * row);
                if (b.low != nullptr)
                    expect_same(isa, what + ", low", a.low, b.low, 3 * row);
                expect_same(isa, what + ", scale", a.scale, b.scale, 3 * row / b.block);
                expect_same(isa, what + ", sum", a.sum, b.sum, 3 * row / b.block);
            }
        }
    }
}

void compare_outputs(Isa isa) {
    Random random;
    for (const int64_t out : {1, 17, 123})
        for (const Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16})
            for (const bool biased : {false, true}) {
                Block<float> y = random.floats(3 * out);
                y[0] = std::numeric_limits<float>::infinity();
                y[static_cast<size_t>(3 * out - 1)] = 1e-7f;             // subnormal in 16 bits
                y[static_cast<size_t>(out)] = float_of_bits(0x7F800001); // NaN in bits that 16-bit floats lack
                const Block<float> bias = random.floats(out);
                const Block<uint16_t> half = rounded(bias.get(), out, dtype == Dtype::f32 ? Dtype::f16 : dtype);
                const void* b = dtype == Dtype::f32 ? static_cast<const void*>(bias.get()) : half.get();
                const int64_t bytes = 3 * out * (dtype == Dtype::f32 ? 4 : 2);
                const Block<uint8_t> got = random.bytes(bytes), want = random.bytes(bytes);
                store_outputs(isa, y.get(), out, 3, out, biased ? b : nullptr, dtype, got.get());
                store_outputs(Isa::scalar, y.get(), out, 3, out, biased ? b : nullptr, dtype, want.get());
                expect_same(isa, "outputs of " + std::to_string(out), got.get(), want.get(), bytes);
            }
}

void compare_transforms(Isa isa) {
    Random random;
    for (const int64_t n : {1, 2, 3, 4, 6, 8, 12, 17, 20, 24, 40, 64, 123, 256, 576, 960, 1536, 2048, 4112, 8192}) {
        std::vector<int64_t> order(static_cast<size_t>(n));
        for (int64_t j = 0; j < n; ++j)
            order[static_cast<size_t>(j)] = (j * 5 + 3) % n;
        const bool permutes = n % 5 != 0;
        const Block<float> factors = random.floats(n), x = random.floats(2 * n);
        const auto run = [&](Isa which) {
            InputTransform transform(which, n);
            transform.add_multiply(factors.get());
            transform.add_rotate();
            if (permutes)
                transform.add_gather(order.data());
            std::vector<float> y(static_cast<size_t>(2 * n));
            transform.apply_rows(x.get(), y.data(), 2, 1);
            return y;
        };
        const std::vector<float> got = run(isa), want = run(Isa::scalar);
        expect_close(isa, "rotation of " + std::to_string(n), got.data(), want.data(), 2 * n, 2e-6f,
                     [](int64_t) { return 1.0f; });
    }
}

// ---- weights

// y of a weight on two instruction sets, for every number of tokens, and all its rows: those exactly. Products may be
// added up in another order and with one rounding less each: bound * sum of |w x|.
using MakeWeight = std::function<std::unique_ptr<LinearWeight>(Isa isa)>;

void compare_weight(Isa isa, const std::string& what, const MakeWeight& make, float bound = 1e-6f) {
    const std::unique_ptr<LinearWeight> a = make(isa), b = make(Isa::scalar);
    const int64_t out = b->out, in = b->in;
    std::vector<int64_t> index(static_cast<size_t>(out));
    for (int64_t r = 0; r < out; ++r)
        index[static_cast<size_t>(r)] = out - 1 - r;
    std::vector<float> rows(static_cast<size_t>(out * in)), w(rows.size());
    linear_rows(*a, index.data(), out, rows.data(), 1);
    linear_rows(*b, index.data(), out, w.data(), 1);
    expect_same(isa, what + ", rows", rows.data(), w.data(), out * in);
    Random random;
    const Block<float> x = random.floats(most_tokens * in);
    std::vector<float> size(static_cast<size_t>(most_tokens * out)); // of sums, by token and row
    for (int64_t t = 0; t < most_tokens; ++t)
        for (int64_t r = 0; r < out; ++r)
            for (int64_t i = 0; i < in; ++i)
                size[static_cast<size_t>(t * out + out - 1 - r)] +=
                    std::fabs(w[static_cast<size_t>(r * in + i)]) * std::fabs(x[static_cast<size_t>(t * in + i)]);
    for (const int64_t tokens : token_counts) {
        const auto run = [&](Isa which, const LinearWeight& weight) {
            Activations input(which);
            input.set(x.get(), Dtype::f32, tokens, in, nullptr);
            std::vector<float> y(static_cast<size_t>(tokens * out), std::numeric_limits<float>::quiet_NaN());
            input.need(weight.form());
            weight.multiply(input, y.data(), out, 0, weight.blocks()); // by rows: not every set has panels
            return y;
        };
        const std::vector<float> got = run(isa, *a), want = run(Isa::scalar, *b);
        expect_close(isa, what + ", " + std::to_string(tokens) + " tokens", got.data(), want.data(), tokens * out,
                     bound, [&](int64_t i) { return size[static_cast<size_t>(i)]; });
    }
}

struct Shape {
    int64_t out, in;
};

std::string words(const char* kind, int bits, const Shape& s, InputForm form) {
    return std::string(kind) + " of " + std::to_string(bits) + " bits [" + std::to_string(s.out) + ", " +
           std::to_string(s.in) + "], form " + std::to_string(static_cast<int>(form));
}

void compare_codes(Isa isa) {
    Random random;
    int turn = 0;
    for (const Shape& s : {Shape{1, 1}, Shape{17, 123}, Shape{33, 300}})
        for (int bits = 1; bits <= 8; ++bits)
            for (const InputForm form : {InputForm::int8_by_32, InputForm::int16_by_256, InputForm::f32}) {
                const int64_t group = turn % 3 == 0 ? 32 : turn % 3 == 1 ? 0 : 64;
                const bool scaled = turn % 5 != 4, shifted = turn % 2 == 1;
                ++turn;
                const int64_t blocks = (s.out + 15) / 16, tiles = (s.in + 31) / 32;
                const int64_t groups = group == 0 ? 1 : (s.in + group - 1) / group;
                const auto codes = random.bytes(blocks * tiles * bits * codes_plane_bytes);
                const auto scale = random.halves(blocks * groups * 16);
                const auto zero = random.bytes(blocks * groups * 16);
                CodesParts parts{};
                parts.codes = codes.get(), parts.scale = scaled ? scale.get() : nullptr;
                parts.zero = shifted ? zero.get() : nullptr;
                parts.bits = bits, parts.out = s.out, parts.in = s.in, parts.group_size = group;
                for (int64_t i = 0; i < blocks * groups * 16; ++i)
                    zero[static_cast<size_t>(i)] &= static_cast<uint8_t>((1 << bits) - 1);
                // a zero point far from the codes' middle adds what cancels again
                compare_weight(
                    isa, words("int", bits, s, form),
                    [&](Isa which) { return std::make_unique<CodesWeight>(which, form, parts); }, 4e-6f);
            }
}

void compare_tables(Isa isa) {
    Random random;
    for (const Shape& s : {Shape{1, 1}, Shape{17, 123}, Shape{33, 300}})
        for (int entries = 3; entries <= 16; entries += entries < 9 ? 1 : 3)
            for (const bool by_row : {false, true})
                for (const InputForm form : {InputForm::int8_by_32, InputForm::f32}) {
                    const int bits = entries <= 4 ? 2 : entries <= 8 ? 3 : 4;
                    const int64_t blocks = (s.out + 15) / 16, tiles = (s.in + 31) / 32, groups = (s.in + 63) / 64;
                    const auto codes = random.bytes(blocks * tiles * bits * codes_plane_bytes);
                    if (entries < 1 << bits) // codes of rows and columns that there are name entries that there are
                        for (int64_t i = 0; i < blocks * tiles * bits * codes_plane_bytes; ++i)
                            codes[static_cast<size_t>(i)] &= bits == 2        ? 0xAA
                                                             : bits == 4      ? 0x77
                                                             : i / 64 % 3 < 2 ? 255
                                                                              : 0;
                    const auto scale = random.halves(blocks * groups * 16);
                    const auto table = random.halves((by_row ? s.out : 1) * entries);
                    const auto bytes = random.bytes(by_row ? blocks * ((entries + 3) / 4) * 64 : 16);
                    const auto unit = random.floats(by_row ? blocks * 16 : 1);
                    CodesParts parts{};
                    parts.codes = codes.get(), parts.scale = scale.get(), parts.table = table.get();
                    parts.table_bytes = bytes.get(), parts.table_unit = unit.get(), parts.table_by_row = by_row;
                    parts.entries = entries, parts.bits = bits, parts.group_size = 64;
                    parts.out = s.out, parts.in = s.in;
                    // the table in bytes is a random one here, larger than the one in float32
                    compare_weight(
                        isa, words(by_row ? "lut by row" : "lut", bits, s, form),
                        [&](Isa which) { return std::make_unique<CodesWeight>(which, form, parts); },
                        form == InputForm::f32 ? 1e-6f : 1e-4f);
                }
}

void compare_int8(Isa isa) {
    Random random;
    for (const Shape& s : {Shape{1, 1}, Shape{3, 4}, Shape{17, 123}, Shape{37, 300}, Shape{16, 1537}})
        for (const InputForm form : {InputForm::int8_by_32, InputForm::int16_by_256, InputForm::f32}) {
            const auto codes = random.bytes(s.out * s.in);
            const auto scale = random.halves(s.out);
            compare_weight(isa, words("int8", 8, s, form), [&](Isa which) {
                return std::make_unique<Int8Weight>(which, form, codes.get(), scale.get(), s.out, s.in);
            });
        }
}

void compare_trellis(Isa isa) {
    Random random;
    for (int m = trellis_least_bits; m <= trellis_most_bits; ++m)
        for (const InputForm form : {InputForm::int8_by_256, InputForm::int16_by_256, InputForm::f32}) {
            const int turn = m + static_cast<int>(form);
            const Shape s = turn % 7 == 0 ? Shape{1, 1} : turn % 7 == 1 ? Shape{17, 300} : Shape{16, 123};
            const int window = 12 + turn % 3 * 2;
            const int64_t tiles = ((s.out + 15) / 16) * ((s.in + 15) / 16);
            const auto codes = random.bytes(tiles * 2 * m);
            const auto scale = random.halves(s.out);
            // integers to the end: what differs is the order of a few additions
            compare_weight(isa, words("trellis", m, s, form), [&](Isa which) {
                return std::make_unique<TrellisLinear>(which, form, codes.get(), scale.get(), s.out, s.in,
                                                       TrellisCode{m, window});
            });
        }
    for (const int m : {32, 80}) { // more columns than stay in the cache for 16 rows
        const Shape s{16, 8300};
        const auto codes = random.bytes((s.in + 15) / 16 * 2 * m);
        const auto scale = random.halves(s.out);
        compare_weight(isa, words("trellis", m, s, InputForm::int8_by_256), [&](Isa which) {
            return std::make_unique<TrellisLinear>(which, InputForm::int8_by_256, codes.get(), scale.get(), s.out, s.in,
                                                   TrellisCode{m, 16});
        });
    }
}

void compare_dense(Isa isa) {
    Random random;
    for (const Shape& s : {Shape{1, 1}, Shape{17, 123}, Shape{5, 577}})
        for (const Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16}) {
            const auto w = random.floats(s.out * s.in);
            const auto half = rounded(w.get(), s.out * s.in, dtype == Dtype::f32 ? Dtype::f16 : dtype);
            const void* values = dtype == Dtype::f32 ? static_cast<const void*>(w.get()) : half.get();
            compare_weight(isa, words("dense", 16, s, InputForm::f32),
                           [&](Isa which) { return std::make_unique<DenseWeight>(which, values, dtype, s.out, s.in); });
        }
}

// ---- what a decoder computes besides

void compare_vector_math(Isa isa) {
    Random random;
    const VectorMath &a = vector_math(isa), &b = vector_math(Isa::scalar);
    for (const int64_t n : {1, 5, 8, 17, 123}) {
        const auto x = random.floats(2 * n), y = random.floats(n), z = random.floats(n);
        for (int64_t i = 0; i < 2 * n; ++i)
            x[static_cast<size_t>(i)] *= 40; // tails of e^x among them
        const auto both = [&](const char* what, const std::function<void(const VectorMath&, float*)>& run) {
            std::vector<float> got(x.get(), x.get() + 2 * n), want = got;
            run(a, got.data());
            run(b, want.data());
            expect_close(isa, std::string(what) + " of " + std::to_string(n), got.data(), want.data(), 2 * n, 1e-6f,
                         [&](int64_t i) { return 60 + std::fabs(want[static_cast<size_t>(i)]); });
        };
        both("rms_norm", [&](const VectorMath& m, float* v) { m.rms_norm(v, y.get(), 1e-5f, n, v); });
        both("silu", [&](const VectorMath& m, float* v) { m.silu_multiply(v, y.get(), n); });
        both("gelu", [&](const VectorMath& m, float* v) { m.gelu_tanh_multiply(v, y.get(), n); });
        both("add", [&](const VectorMath& m, float* v) { m.add(y.get(), n, v); });
        both("turn", [&](const VectorMath& m, float* v) { m.turn(v, y.get(), z.get(), n); });
        std::vector<float> broken(static_cast<size_t>(n), std::numeric_limits<float>::quiet_NaN());
        a.silu_multiply(broken.data(), y.get(), n);
        ++compared;
        if (!std::all_of(broken.begin(), broken.end(), [](float f) { return std::isnan(f); }))
            report(isa, "silu", "NaN does not stay NaN");
    }
}

void compare_attention(Isa isa) {
    Random random;
    for (const int64_t dim : {6, 34, 64, 260})
        for (const Dtype dtype : {Dtype::f32, Dtype::bf16})
            for (const int64_t window : {0, 5}) {
                const int64_t heads = 4, kv_heads = 2, first = 66, tokens = 3;
                KvCache cache(1, kv_heads, dim, dtype, first + tokens);
                for (int64_t p = 0; p < first + tokens; ++p)
                    for (int64_t h = 0; h < kv_heads; ++h)
                        cache.put(0, h, p, random.floats(dim).get(), random.floats(dim).get());
                const int64_t row = cache.row();
                std::vector<float> q(static_cast<size_t>(tokens * heads * row)), sums(q.size());
                std::vector<float> softmax(static_cast<size_t>(tokens * heads * 2));
                for (int64_t query = 0; query < tokens * heads; ++query)
                    for (int64_t i = 0; i < dim; ++i)
                        q[static_cast<size_t>(query * row + i)] = 3 * random.number();
                std::vector<float> got(static_cast<size_t>(tokens * heads * dim)), want = got;
                AttentionCall call{cache.keys(0), cache.values(0), dtype,          cache.capacity() * row,
                                   row,           heads,           kv_heads,       dim,
                                   first,         tokens,          window,         0.4f,
                                   q.data(),      sums.data(),     softmax.data(), got.data()};
                attend(isa, call, 1);
                call.out = want.data();
                attend(Isa::scalar, call, 1);
                expect_close(isa, "attention of " + std::to_string(dim), got.data(), want.data(), tokens * heads * dim,
                             4e-6f, [](int64_t) { return 1.0f; });
            }
}

// Two rows of pages in a shuffled order, with a ring of tokens that goes round.
void compare_pages(Isa isa) {
    Random random;
    constexpr int64_t batch = 2, heads = 2, group = 3, tokens = 2, pages = 6, slots = 9;
    for (const int64_t width : {8, 64, 72, 128, 160})
        for (const int bits_k : {2, 3, 4, 8})
            for (const bool exact : {false, true}) {
                const int bits_v = bits_k == 8 ? 3 : bits_k == 3 ? 8 : bits_k == 4 ? 2 : 4;
                const int64_t width_v = width == 72 ? 96 : width;
                const auto k = random.bytes(pages * heads * kv_page * kv_row_bytes(width, bits_k));
                const auto v = random.bytes(pages * heads * kv_page * kv_row_bytes(width_v, bits_v));
                const auto k_gain = random.halves(pages * heads * kv_page),
                           v_gain = random.halves(pages * heads * kv_page);
                const auto ring_k = random.halves(batch * slots * heads * width),
                           ring_v = random.halves(batch * slots * heads * width_v);
                const int32_t table[batch * 3] = {4, 0, 2, 1, 5, 3}, lengths[batch] = {150, 64}, kept[batch] = {9, 5},
                                            first[batch] = {4, 0}, start[batch] = {0, 70};
                const auto q = random.floats(batch * heads * group * tokens * width);
                const int64_t n = batch * heads * group * tokens * width_v;
                const Block<float> got(new float[static_cast<size_t>(n)]), want(new float[static_cast<size_t>(n)]);
                KvAttentionCall call{};
                call.k_codes = k.get(), call.v_codes = v.get();
                call.k_gain = k_gain.get(), call.v_gain = v_gain.get();
                call.bits_k = bits_k, call.bits_v = bits_v;
                call.block_table = table, call.table_row = 3, call.lengths = lengths;
                call.window = {ring_k.get(),    ring_v.get(), slots * heads * width,
                               heads * width,   width,        slots * heads * width_v,
                               heads * width_v, width_v,      kept,
                               first,           slots};
                call.dense_dtype = Dtype::f16, call.start = start;
                call.batch = batch, call.kv_heads = heads, call.group = group, call.tokens = tokens;
                call.head_dim = width, call.head_dim_v = width_v;
                call.scale = 0.5f / static_cast<float>(1 << bits_k), call.softcap = exact ? 5.0f : 0.0f;
                call.sliding_window = exact ? 100 : 0, call.exact = exact;
                call.q = q.get(), call.q_dtype = Dtype::f32, call.out_dtype = Dtype::f32;
                call.out = got.get();
                attend_pages(isa, call, 1);
                call.out = want.get();
                attend_pages(Isa::scalar, call, 1);
                const auto size = static_cast<float>(1 << bits_v);
                expect_close(isa, std::to_string(bits_k) + "-bit pages of " + std::to_string(width), got.get(),
                             want.get(), n, 2e-4f, [=](int64_t) { return size; });
            }
}

void compare_append(Isa isa) {
    Random random;
    constexpr int64_t tokens = 5, heads = 3, pages = 2;
    for (const int64_t width : {8, 64, 72, 96, 256})
        for (const int bits : {2, 3, 4, 8}) {
            const auto x = random.halves(tokens * heads * width);
            const auto mean = random.floats(heads * width);
            const int64_t slots[tokens] = {127, 3, 64, 0, 63};
            const int64_t rows = pages * heads * kv_page, n = rows * kv_row_bytes(width, bits);
            const KvTokens from{x.get(), Dtype::f16, heads * width, width, tokens, heads, width, mean.get(), true};
            const auto got = random.bytes(n);
            const Block<uint8_t> want(new uint8_t[static_cast<size_t>(n)]);
            std::copy_n(got.get(), n, want.get());
            const auto got_gain = random.halves(rows);
            const Block<uint16_t> want_gain(new uint16_t[static_cast<size_t>(rows)]);
            std::copy_n(got_gain.get(), rows, want_gain.get());
            append_tokens(isa, from, {got.get(), got_gain.get(), pages, bits, bits > 3, slots}, 1);
            append_tokens(Isa::scalar, from, {want.get(), want_gain.get(), pages, bits, bits > 3, slots}, 1);
            const std::string what = std::to_string(bits) + "-bit tokens of " + std::to_string(width);
            expect_same(isa, what, got.get(), want.get(), n);
            expect_same(isa, what + ", gains", got_gain.get(), want_gain.get(), rows);
        }
}

void compare_bandwidth(Isa isa) {
    Random random;
    for (const int64_t bytes : {0, 8, 64, 1000, 4097, 20000}) {
        const auto data = random.bytes(bytes);
        const uint64_t got = read_bytes(isa, data.get(), bytes, 1),
                       want = read_bytes(Isa::scalar, data.get(), bytes, 1);
        expect_same(isa, std::to_string(bytes) + " bytes read", &got, &want, 1);
    }
}

void compare_encoder(Isa isa) {
    Random random;
    for (int m = trellis_least_bits; m <= trellis_most_bits; ++m) {
        const int64_t tiles = 2; // a pair
        const auto x = random.floats(tiles * 256);
        for (int64_t i = 0; i < tiles * 256; ++i)
            x[static_cast<size_t>(i)] = (x[static_cast<size_t>(i)] + random.number() + random.number()) * 148;
        const int window = m % 16 == 0 ? 14 : 12;
        const int64_t n = tiles * 2 * m;
        const auto got = random.bytes(n), want = random.bytes(n);
        const int64_t a = trellis_encode(isa, x.get(), tiles, {m, window}, got.get(), nullptr, 1);
        const int64_t b = trellis_encode(Isa::scalar, x.get(), tiles, {m, window}, want.get(), nullptr, 1);
        expect_same(isa, "encoded at m = " + std::to_string(m), got.get(), want.get(), n);
        expect_same(isa, "tiles left to the exact search", &a, &b, 1);
    }
}

} // namespace

int main() {
    std::string names = "scalar";
    for (int i = 1; i < isa_count; ++i) {
        const Isa isa = static_cast<Isa>(i);
        if (!isa_available(isa))
            continue;
        compare_activations(isa);
        compare_outputs(isa);
        compare_transforms(isa);
        compare_codes(isa);
        compare_tables(isa);
        compare_int8(isa);
        compare_trellis(isa);
        compare_dense(isa);
        compare_vector_math(isa);
        compare_attention(isa);
        compare_pages(isa);
        compare_append(isa);
        compare_bandwidth(isa);
        compare_encoder(isa);
        names += std::string(" ") + isa_name(isa);
    }
    std::printf("%s: %d comparisons, %d differences\n", names.c_str(), compared, different);
    return different == 0 ? 0 : 1;
}
