#include "kv_append.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "half.h"
#include "parallel.h"

namespace bitpalette {
namespace {

constexpr int64_t page_tokens = 64;
constexpr int64_t most_odd = 1024;
// Below this many elements a thread (about 10 us), waking another one (about 2 us) costs more than it saves.
constexpr int64_t elements_per_thread = 8192;

struct Units {
    const KvAppendUnit& append;
    const TransformOps& transform;
};

Units units_of(Isa isa) {
    if (!isa_available(isa))
        throw std::invalid_argument(std::string("this machine has no ") + isa_name(isa));
#if BITPALETTE_X86
    if (plain_isa(isa) == Isa::avx512)
        return {kv_append_avx512, transform_avx512};
    if (plain_isa(isa) == Isa::avx2)
        return {kv_append_avx2, transform_avx2};
#endif
#if BITPALETTE_AARCH64
    if (isa == Isa::neon)
        return {kv_append_neon, transform_neon};
#endif
    return {kv_append_scalar, transform_scalar};
}

// quant/kv_token.py's STEP
float step_of(int bits) {
    switch (bits) {
    case 2:
        return 0.9956867f;
    case 3:
        return 0.5860194f;
    case 4:
        return 0.3352006f;
    case 8:
        return 0.0307624f;
    }
    throw std::invalid_argument("kv append: " + std::to_string(bits) + " bits; 2, 3, 4 and 8 have a kernel");
}

using Matrix = std::shared_ptr<const std::vector<float>>;

// DHT_p [p, p]; kept, since a model has one or two sizes of head
Matrix hartley(int64_t p) {
    static std::mutex lock;
    static std::map<int64_t, Matrix> made;
    const std::lock_guard<std::mutex> locked(lock);
    Matrix& known = made[p];
    if (known == nullptr) {
        auto matrix = std::make_shared<std::vector<float>>();
        for (int64_t i = 0; i < p; ++i)
            for (int64_t j = 0; j < p; ++j) {
                const double angle = 2 * M_PI / static_cast<double>(p) * static_cast<double>(i * j % p);
                const double value = (std::cos(angle) + std::sin(angle)) / std::sqrt(static_cast<double>(p));
                matrix->push_back(static_cast<float>(value));
            }
        known = matrix;
    }
    return known;
}

struct Rows {
    const KvTokens& tokens;
    const KvPages* pages; // null: `dense` of `dtype` instead
    void* dense;
    Dtype dtype;
    const Units units;
    KvRotation rotation;
    float step;
};

void run_rows(void* data, int64_t begin, int64_t end) {
    const Rows& rows = *static_cast<const Rows*>(data);
    const KvTokens& x = rows.tokens;
    const int64_t padded = (x.width + transform_columns - 1) / transform_columns * transform_columns;
    std::vector<float> room(static_cast<size_t>(2 * padded));
    std::vector<uint8_t> codes(static_cast<size_t>(x.width));
    float* z = room.data();
    for (int64_t i = begin; i < end; ++i) {
        const int64_t token = i / x.heads, head = i % x.heads;
        rows.units.append.load(x, rows.rotation, token, head, z, z + padded);
        if (rows.pages == nullptr) {
            for (int64_t k = 0; k < x.width; ++k)
                store_element(rows.dense, rows.dtype, i * x.width + k, z[k]);
            continue;
        }
        const KvPages& to = *rows.pages;
        const int64_t slot = to.slots[token];
        const int64_t row = (slot / page_tokens * x.heads + head) * page_tokens + slot % page_tokens;
        rows.units.append.encode(z, x.width, to.bits, to.unbiased, rows.step, codes.data(),
                                 to.codes + row * (x.width * to.bits / 8), to.gain + row);
    }
}

void run(Rows& rows, int threads) {
    const KvTokens& x = rows.tokens;
    if (x.heads < 1 || x.width < 8 || x.width % 8 != 0 || x.tokens < 0)
        throw std::invalid_argument("kv append: tokens [" + std::to_string(x.tokens) + ", " + std::to_string(x.heads) +
                                    ", " + std::to_string(x.width) + "]; the last is a multiple of 8");
    const int64_t width = x.width & -x.width, p = x.width / width;
    Matrix matrix;
    if (x.rotate && p > most_odd)
        throw std::invalid_argument("kv append: a head_dim of " + std::to_string(x.width) + ", whose odd part " +
                                    std::to_string(p) + " is above " + std::to_string(most_odd));
    if (x.rotate && p > 1)
        matrix = hartley(p);
    rows.rotation = {matrix == nullptr ? nullptr : matrix->data(), p, width,
                     static_cast<float>(1 / std::sqrt(static_cast<double>(width))), &rows.units.transform};
    const int64_t useful =
        std::clamp<int64_t>(x.tokens * x.heads * x.width / elements_per_thread, 1, std::max(threads, 1));
    parallel_for(x.tokens * x.heads, static_cast<int>(useful), run_rows, &rows);
}

} // namespace

void append_tokens(Isa isa, const KvTokens& tokens, const KvPages& to, int threads) {
    for (int64_t i = 0; i < tokens.tokens; ++i)
        if (to.slots[i] < 0 || to.slots[i] >= to.pages * page_tokens)
            throw std::invalid_argument("kv append: slot " + std::to_string(to.slots[i]) + " of " +
                                        std::to_string(to.pages) + " pages of " + std::to_string(page_tokens));
    Rows rows{tokens, &to, nullptr, Dtype::f32, units_of(isa), {}, step_of(to.bits)};
    run(rows, threads);
}

void rotate_tokens(Isa isa, const KvTokens& tokens, Dtype dtype, void* z, int threads) {
    Rows rows{tokens, nullptr, z, dtype, units_of(isa), {}, 0};
    run(rows, threads);
}

} // namespace bitpalette
