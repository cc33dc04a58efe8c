// What is no linear kernel, on memory of exactly its size, for a build with sanitizers: inputs in all forms, their
// transforms, vectors, attention, encoders. Instruction sets against the scalar unit.
#include <algorithm>
#include <vector>

#include "cpu/activations.h"
#include "cpu/attention_decode.h"
#include "cpu/bandwidth.h"
#include "cpu/input_transform.h"
#include "cpu/kmeans.h"
#include "cpu/kv_cache.h"
#include "cpu/linear.h"
#include "cpu/trellis_decode.h"
#include "cpu/trellis_encode.h"
#include "cpu/vector_math.h"
#include "exact_block.h"

using namespace bitpalette;

namespace {

constexpr Dtype dtypes[] = {Dtype::f32, Dtype::f16, Dtype::bf16};
constexpr int64_t widths[] = {1, 2, 7, 15, 16, 17, 31, 33, 48, 100, 123, 255, 257, 576, 1024, 1537};

int64_t size_of(Dtype dtype) {
    return dtype == Dtype::f32 ? 4 : 2;
}

// Those with code of their own for this; scalar first.
std::vector<Isa> isas(bool with_vbmi = false) {
    std::vector<Isa> found;
    for (int i = 0; i < isa_count; ++i)
        if (isa_available(static_cast<Isa>(i)) && (with_vbmi || static_cast<Isa>(i) != Isa::avx512vbmi))
            found.push_back(static_cast<Isa>(i));
    return found;
}

// Runs compute(isa, result [n]) on every instruction set; results lie within bound times the norm of the scalar one's.
template <class Compute>
void agree(const std::string& what, int64_t n, double bound, const Compute& compute, bool with_vbmi = false) {
    Exact<float> scalar(n);
    compute(Isa::scalar, scalar.data());
    const double norm = distance(scalar.data(), nullptr, n);
    for (const Isa isa : isas(with_vbmi)) {
        Exact<float> y(n);
        y.fill(NAN);
        compute(isa, y.data());
        expect_close(y.data(), scalar.data(), n, bound * norm, what + " on " + isa_name(isa));
    }
}

void check_vector_math(int64_t n) {
    Numbers numbers(1);
    const Exact<float> a = numbers.floats(n), b = numbers.floats(n);
    const std::string columns = " of " + std::to_string(n);
    const auto copy = [&](float* y) { std::copy_n(a.data(), n, y); };
    agree("rms_norm" + columns, n, 1e-5,
          [&](Isa isa, float* y) { vector_math(isa).rms_norm(a.data(), b.data(), 1e-5f, n, y); });
    agree("silu" + columns, n, 1e-5, [&](Isa isa, float* y) {
        copy(y);
        vector_math(isa).silu_multiply(y, b.data(), n);
    });
    agree("gelu" + columns, n, 1e-5, [&](Isa isa, float* y) {
        copy(y);
        vector_math(isa).gelu_tanh_multiply(y, b.data(), n);
    });
    agree("add" + columns, n, 0, [&](Isa isa, float* y) {
        copy(y);
        vector_math(isa).add(b.data(), n, y);
    });
    if (n % 2 == 0) {
        const Exact<float> cosine = numbers.floats(n / 2), sine = numbers.floats(n / 2);
        agree("turn" + columns, n, 1e-6, [&](Isa isa, float* y) {
            copy(y);
            vector_math(isa).turn(y, cosine.data(), sine.data(), n / 2);
        });
    }
}

// x as it is, and by transforms of all kinds; then what comes of it in all forms, and outputs on their way back.
void check_input(int64_t n, Dtype dtype, int64_t tokens) {
    Numbers numbers(static_cast<uint32_t>(n));
    const Exact<float> values = numbers.floats(tokens * n), factors = numbers.floats(n), bias = numbers.floats(n);
    const Exact<unsigned char> x = numbers.elements(values.data(), tokens * n, dtype);
    const Exact<unsigned char> biases = numbers.elements(bias.data(), n, dtype);
    Exact<int64_t> order(n);
    for (int64_t i = 0; i < n; ++i)
        order[i] = n - 1 - i;
    for (int steps = 0; steps < 8; ++steps) {
        const std::string what = "input of " + std::to_string(n) + ", transform " + std::to_string(steps);
        const auto transform = [&](Isa isa) {
            auto made = std::make_unique<InputTransform>(isa, n);
            if ((steps & 1) != 0)
                made->add_multiply(factors.data());
            if ((steps & 2) != 0 && n / (n & -n) <= InputTransform::most_odd)
                made->add_rotate();
            if ((steps & 4) != 0)
                made->add_gather(order.data());
            return made;
        };
        agree(what, tokens * n, 1e-5, [&](Isa isa, float* y) {
            const auto t = transform(isa);
            Activations input(isa);
            input.set(x.data(), dtype, tokens, n, steps == 0 ? nullptr : t.get());
            const FloatInput f = input.floats();
            for (int64_t i = 0; i < tokens; ++i)
                std::copy_n(f.values + i * f.row, n, y + i * n);
        });
        if (dtype == Dtype::f32)
            agree(what + " by rows", tokens * n, 1e-5,
                  [&](Isa isa, float* y) { transform(isa)->apply_rows(values.data(), y, tokens, 1); });
    }
    for (const InputForm form : {InputForm::int8_by_32, InputForm::int8_by_256, InputForm::int16_by_256})
        agree("quantized " + std::to_string(n), tokens * n, 1e-6, [&](Isa isa, float* y) {
            Activations input(isa);
            input.set(x.data(), dtype, tokens, n, nullptr);
            input.need(form);
            const Int8Blocks q = input.int8(form);
            for (int64_t i = 0; i < tokens * n; ++i) {
                const int64_t at = i / n * q.row + i % n;
                const float low = q.low == nullptr ? 0.0f : static_cast<float>(q.low[at]) / 256;
                y[i] = (static_cast<float>(q.codes[at]) + low) * q.scale[at / q.block];
            }
        });
    agree("stored " + std::to_string(n), tokens * n, 0, [&](Isa isa, float* y) {
        const Exact<unsigned char> to(tokens * n * size_of(dtype), static_cast<size_t>(size_of(dtype)));
        store_outputs(isa, values.data(), n, tokens, n, n % 2 == 0 ? biases.data() : nullptr, dtype, to.data());
        for (int64_t i = 0; i < tokens * n; ++i)
            y[i] = load_element(to.data(), dtype, i);
    });
}

void check_attention(Dtype dtype, int64_t heads, int64_t kv_heads, int64_t dim, int64_t first, int64_t tokens,
                     int64_t window) {
    Numbers numbers(static_cast<uint32_t>(dim));
    KvCache cache(2, kv_heads, dim, dtype, 1); // it grows on the way
    for (int64_t p = 0; p < first + tokens; ++p)
        for (int64_t h = 0; h < kv_heads; ++h) {
            cache.reserve(p + 1);
            const Exact<float> key = numbers.floats(dim), value = numbers.floats(dim);
            cache.put(1, h, p, key.data(), value.data());
        }
    const int64_t row = cache.row();
    const Exact<float> q(tokens * heads * row);
    for (int64_t i = 0; i < q.size(); ++i)
        q[i] = i % row < dim ? numbers.number() : 0.0f;
    // exactly what the call may read: positions up to the last
    const int64_t last = first + tokens, bytes = row * size_of(dtype);
    const Exact<unsigned char> keys(kv_heads * last * bytes, 64), values(kv_heads * last * bytes, 64);
    for (int64_t h = 0; h < kv_heads; ++h) {
        const int64_t from = h * cache.capacity() * bytes, to = h * last * bytes;
        std::memcpy(keys.data() + to, static_cast<const char*>(cache.keys(1)) + from,
                    static_cast<size_t>(last * bytes));
        std::memcpy(values.data() + to, static_cast<const char*>(cache.values(1)) + from,
                    static_cast<size_t>(last * bytes));
    }
    agree("attention of " + std::to_string(dim), tokens * heads * dim, 1e-5, [&](Isa isa, float* y) {
        const Exact<float> sums(tokens * heads * row), softmax(tokens * heads * 2);
        AttentionCall call{};
        call.keys = keys.data(), call.values = values.data(), call.dtype = dtype;
        call.stride = last * row, call.row = row;
        call.heads = heads, call.kv_heads = kv_heads, call.head_dim = dim;
        call.first = first, call.tokens = tokens, call.window = window, call.scale = 0.3f;
        call.q = q.data(), call.sums = sums.data(), call.softmax = softmax.data(), call.out = y;
        attend(isa, call, 1);
    });
}

void check_bandwidth() {
    Numbers numbers(4);
    for (const int64_t n : {0, 1, 7, 8, 63, 64, 65, 511, 513, 4096, 4097, 20000}) {
        const Exact<uint8_t> memory = numbers.bytes(n);
        const uint64_t scalar = read_bytes(Isa::scalar, memory.data(), n, 1);
        for (const Isa isa : isas())
            for (const int threads : {1, 3})
                if (read_bytes(isa, memory.data(), n, threads) != scalar)
                    fail("read_bytes of " + std::to_string(n) + " on " + isa_name(isa));
    }
}

void check_kmeans() {
    Numbers numbers(5);
    for (const int64_t n : {1, 2, 5, 33, 100})
        for (const int64_t entries : {1, 2, 3, 8, 16}) {
            const int64_t rows = 3;
            const Exact<float> values = numbers.floats(rows * n);
            Exact<float> weights = numbers.floats(rows * n);
            for (int64_t i = 0; i < weights.size(); ++i)
                weights[i] = std::fabs(weights[i]);
            const Exact<float> one(rows * entries), three(rows * entries);
            kmeans_rows(values.data(), weights.data(), rows, n, entries, one.data(), 1);
            kmeans_rows(values.data(), weights.data(), rows, n, entries, three.data(), 3);
            expect_close(one.data(), three.data(), one.size(), 0, "k-means of " + std::to_string(n));
        }
}

void check_trellis_encode(TrellisCode code, int64_t tiles) {
    Numbers numbers(static_cast<uint32_t>(code.m));
    Exact<float> x = numbers.floats(tiles * trellis_weights);
    for (int64_t i = 0; i < x.size(); ++i)
        x[i] *= i < trellis_weights ? 30000.0f : 250.0f; // the first is for the 64-bit search
    agree(
        "trellis of " + std::to_string(code.m), x.size(), 0,
        [&](Isa isa, float* levels) {
            const Exact<uint8_t> codes(tiles * code.bytes());
            const int64_t exact = trellis_encode(isa, x.data(), tiles, code, codes.data(), levels, 2);
            if (exact < 0 || exact > tiles)
                fail("trellis_encode says " + std::to_string(exact));
            // the codes read back as the levels, whatever instruction set reads them
            Exact<float> scale(16), rows(16 * 16 * tiles);
            scale.fill(128.0f);
            const TrellisWeight w{codes.data(), scale.data(), 16, 16 * tiles, code};
            trellis_decode(isa, w, nullptr, 16, rows.data(), 1);
            for (int64_t i = 0; i < x.size(); ++i) {
                const int64_t tile = i / trellis_weights, row = i % trellis_weights / 16, column = i % 16;
                if (!(rows[row * 16 * tiles + tile * 16 + column] == levels[i]))
                    fail("level " + std::to_string(i) + " does not read back on " + isa_name(isa));
            }
        },
        true);
}

} // namespace

int main() {
    for (const int64_t n : widths) {
        check_vector_math(n);
        for (const Dtype dtype : dtypes)
            for (const int64_t tokens : {1, 3})
                check_input(n, dtype, tokens);
    }
    for (const Dtype dtype : {Dtype::f32, Dtype::bf16}) {
        check_attention(dtype, 1, 1, 1, 0, 1, 0);
        check_attention(dtype, 6, 2, 18, 30, 7, 0);
        check_attention(dtype, 4, 4, 64, 40, 2, 33);
        check_attention(dtype, 5, 1, 130, 70, 8, 5);
    }
    check_bandwidth();
    check_kmeans();
    for (const int m : {16, 24, 37, 80})
        check_trellis_encode({m, 12}, 3);
    std::printf("clean\n");
    return 0;
}
