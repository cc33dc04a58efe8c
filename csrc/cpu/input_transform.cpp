#include "input_transform.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "parallel.h"

namespace bitpalette {
namespace {

// Below this many columns a thread (about 10 us), waking another one (about 2 us) costs more than it saves.
constexpr int64_t columns_per_thread = 8192;

const TransformOps& transform_ops(Isa isa) {
#if BITPALETTE_X86
    if (plain_isa(isa) == Isa::avx512)
        return transform_avx512;
    if (plain_isa(isa) == Isa::avx2)
        return transform_avx2;
#endif
#if BITPALETTE_AARCH64
    if (isa == Isa::neon)
        return transform_neon;
#endif
    return transform_scalar;
}

int64_t power_of_two(int64_t n) {
    return n & -n;
}

int64_t padded_to(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

// DHT_p / sqrt(width) [p, row], row = p in whole vectors. One for all transforms of a size: a model's layers have
// orders of their own and would keep as many.
std::shared_ptr<const std::vector<float>> odd_matrix(int64_t p, int64_t width) {
    static std::mutex lock;
    static std::map<std::pair<int64_t, int64_t>, std::weak_ptr<const std::vector<float>>> made;
    const std::lock_guard<std::mutex> locked(lock);
    std::weak_ptr<const std::vector<float>>& known = made[{p, width}];
    if (std::shared_ptr<const std::vector<float>> matrix = known.lock())
        return matrix;
    const int64_t row = padded_to(p, transform_columns);
    auto matrix = std::make_shared<std::vector<float>>(static_cast<size_t>(p * row));
    const double unit = 1 / std::sqrt(static_cast<double>(p) * static_cast<double>(width));
    for (int64_t i = 0; i < p; ++i)
        for (int64_t j = 0; j < p; ++j) {
            const double angle = 2 * M_PI / static_cast<double>(p) * static_cast<double>(i * j % p);
            (*matrix)[static_cast<size_t>(i * row + j)] =
                static_cast<float>((std::cos(angle) + std::sin(angle)) * unit);
        }
    known = matrix;
    return matrix;
}

} // namespace

InputTransform::InputTransform(Isa isa, int64_t n) : load_(activation_ops(isa)), ops_(transform_ops(isa)), n_(n) {
    if (!isa_available(isa))
        throw std::invalid_argument(std::string("this machine has no ") + isa_name(isa));
    if (n < 1)
        throw std::invalid_argument("a transform of " + std::to_string(n) + " columns");
}

void InputTransform::add_multiply(const float* factors) {
    Step step{Step::Kind::multiply, {factors, factors + n_}, {}, {}, nullptr};
    step.factors.resize(static_cast<size_t>(padded()));
    steps_.push_back(std::move(step));
}

void InputTransform::add_rotate() {
    const int64_t width = power_of_two(n_), p = n_ / width;
    if (p > most_odd)
        throw std::invalid_argument("a rotation of " + std::to_string(n_) + " columns, whose odd part " +
                                    std::to_string(p) + " is above " + std::to_string(most_odd));
    if (p == 1) { // the unit goes into the factors that come before, or there is a step for it
        if (steps_.empty() || steps_.back().kind != Step::Kind::multiply)
            add_multiply(std::vector<float>(static_cast<size_t>(n_), 1.0f).data());
        const double unit = 1 / std::sqrt(static_cast<double>(width));
        for (float& factor : steps_.back().factors)
            factor = static_cast<float>(factor * unit);
    }
    if (width > 1)
        steps_.push_back({Step::Kind::hadamard, {}, {}, {nullptr, p, 0, width}, nullptr});
    if (p > 1) {
        const auto matrix = odd_matrix(p, width);
        const OddFactor odd{matrix->data(), p, padded_to(p, transform_columns), width};
        steps_.push_back({Step::Kind::odd, {}, {}, odd, matrix});
    }
}

void InputTransform::add_gather(const int64_t* order) {
    // what fills up the row comes from a column that does so too, and is zero
    std::vector<int32_t> to(static_cast<size_t>(padded()), static_cast<int32_t>(n_));
    std::vector<bool> seen(static_cast<size_t>(n_));
    for (int64_t j = 0; j < n_; ++j) {
        if (order[j] < 0 || order[j] >= n_ || seen[static_cast<size_t>(order[j])])
            throw std::invalid_argument("the order of " + std::to_string(n_) + " columns is no permutation");
        seen[static_cast<size_t>(order[j])] = true;
        to[static_cast<size_t>(j)] = static_cast<int32_t>(order[j]);
    }
    steps_.push_back({Step::Kind::gather, {}, std::move(to), {}, nullptr});
}

void InputTransform::apply(const void* x, Dtype dtype, float* to, float* room) const {
    const int64_t all = padded();
    if (std::count_if(steps_.begin(), steps_.end(), [this](const Step& step) { return moves(step); }) % 2 != 0)
        std::swap(to, room); // the last move ends where the caller wants it
    auto step = steps_.begin();
    const bool multiply_first = step != steps_.end() && step->kind == Step::Kind::multiply;
    load_.load(x, dtype, n_, multiply_first ? step->factors.data() : nullptr, to);
    std::fill(to + n_, to + all, 0.0f);
    for (step += multiply_first; step != steps_.end(); ++step) {
        if (step->kind == Step::Kind::multiply) {
            ops_.multiply(to, step->factors.data(), all);
        } else if (step->kind == Step::Kind::hadamard) {
            ops_.hadamard(to, all, step->odd.width);
        } else {
            if (step->kind == Step::Kind::gather) {
                ops_.gather(to, step->order.data(), all, room);
            } else {
                ops_.odd(to, step->odd, room);
                std::fill(room + n_, room + all, 0.0f);
            }
            std::swap(to, room);
        }
    }
}

void InputTransform::apply_rows(const float* x, float* y, int64_t tokens, int threads) const {
    struct Call {
        const InputTransform& transform;
        const float* x;
        float* y;
    } call{*this, x, y};
    const auto body = [](void* context, int64_t begin, int64_t end) {
        const Call& c = *static_cast<const Call*>(context);
        const int64_t n = c.transform.n(), all = c.transform.padded();
        std::vector<float> room(static_cast<size_t>(2 * all));
        for (int64_t t = begin; t < end; ++t) {
            c.transform.apply(c.x + t * n, Dtype::f32, room.data(), room.data() + all);
            std::copy(room.data(), room.data() + n, c.y + t * n);
        }
    };
    const int64_t useful = std::clamp<int64_t>(tokens * n_ / columns_per_thread, 1, std::max(threads, 1));
    parallel_for(tokens, static_cast<int>(useful), body, &call);
}

} // namespace bitpalette
