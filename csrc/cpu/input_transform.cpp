#include "input_transform.h"

#include <cmath>
#include <stdexcept>
#include <string>

namespace bitpalette {
namespace {

int64_t power_of_two(int64_t n) {
    return n & -n;
}

} // namespace

InputTransform::InputTransform(Isa isa, int64_t n) : isa_(isa), n_(n) {
    if (!isa_available(isa))
        throw std::invalid_argument(std::string("this machine has no ") + isa_name(isa));
    if (n < 1)
        throw std::invalid_argument("a transform of " + std::to_string(n) + " columns");
}

void InputTransform::add_multiply(const float* factors) {
    steps_.push_back({Step::Kind::multiply, {factors, factors + n_}, {}});
}

void InputTransform::add_rotate() {
    const int64_t p = n_ / power_of_two(n_);
    odd_.resize(static_cast<size_t>(p * p));
    for (int64_t i = 0; i < p; ++i)
        for (int64_t j = 0; j < p; ++j) {
            const double angle = 2 * M_PI / static_cast<double>(p) * static_cast<double>(i * j % p);
            odd_[static_cast<size_t>(i * p + j)] =
                static_cast<float>((std::cos(angle) + std::sin(angle)) / std::sqrt(static_cast<double>(p)));
        }
    steps_.push_back({Step::Kind::rotate, {}, {}});
}

void InputTransform::add_gather(const int64_t* order) {
    std::vector<int32_t> to(static_cast<size_t>(n_));
    std::vector<bool> seen(static_cast<size_t>(n_));
    for (int64_t j = 0; j < n_; ++j) {
        if (order[j] < 0 || order[j] >= n_ || seen[static_cast<size_t>(order[j])])
            throw std::invalid_argument("the order of " + std::to_string(n_) + " columns is no permutation");
        seen[static_cast<size_t>(order[j])] = true;
        to[static_cast<size_t>(j)] = static_cast<int32_t>(order[j]);
    }
    steps_.push_back({Step::Kind::gather, {}, std::move(to)});
}

void InputTransform::apply(float* x, float* room) const {
    for (const Step& step : steps_) {
        if (step.kind == Step::Kind::multiply) {
            for (int64_t j = 0; j < n_; ++j)
                x[j] *= step.factors[static_cast<size_t>(j)];
        } else if (step.kind == Step::Kind::gather) {
            for (int64_t j = 0; j < n_; ++j)
                room[j] = x[step.order[static_cast<size_t>(j)]];
            for (int64_t j = 0; j < n_; ++j)
                x[j] = room[j];
        } else {
            const int64_t two = power_of_two(n_), p = n_ / two;
            const float unit = static_cast<float>(1 / std::sqrt(static_cast<double>(two)));
            for (int64_t width = 1; width < two; width *= 2)
                for (int64_t first = 0; first < n_; first += 2 * width)
                    for (int64_t j = first; j < first + width; ++j) {
                        const float a = x[j], b = x[j + width];
                        x[j] = a + b;
                        x[j + width] = a - b;
                    }
            for (int64_t i = 0; i < p; ++i) {
                float* to = room + i * two;
                for (int64_t j = 0; j < two; ++j)
                    to[j] = 0;
                for (int64_t k = 0; k < p; ++k) {
                    const float factor = odd_[static_cast<size_t>(i * p + k)] * unit;
                    for (int64_t j = 0; j < two; ++j)
                        to[j] += factor * x[k * two + j];
                }
            }
            for (int64_t j = 0; j < n_; ++j)
                x[j] = room[j];
        }
    }
}

} // namespace bitpalette
