#include "kmeans.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "parallel.h"

namespace bitpalette {
namespace {

// Of a row's largest weight: numbers of no weight keep a place between their neighbours.
constexpr double weight_floor = 1e-12;

// One row at a time, in memory that is kept from row to row.
class Row {
  public:
    Row(int64_t n, int64_t entries)
        : n_(static_cast<size_t>(n)), entries_(static_cast<size_t>(entries)), order_(n_), value_(n_), mass_(n_ + 1),
          moment_(n_ + 1), gain_(n_ + 1), next_(n_ + 1), first_(entries_ * (n_ + 1)) {}

    void solve(const float* values, const float* weights, float* levels) {
        gather(values, weights);
        if (count_ <= entries_) {
            for (size_t k = 0; k < entries_; ++k)
                levels[k] = static_cast<float>(value_[std::min(k, count_ - 1)]);
            return;
        }
        for (size_t i = 1; i <= count_; ++i)
            gain_[i] = gain_of(0, i);
        int32_t* first = first_.data() + (n_ + 1); // of the layer of two cells
        std::fill_n(first_.data(), n_ + 1, 0);
        for (size_t k = 2; k <= entries_; ++k, first += n_ + 1) {
            const size_t last = count_ - (entries_ - k); // numbers to the right that the other cells need
            layer(first - (n_ + 1), first, k == entries_ ? last : k, last, k - 1, last - 1);
            std::swap(gain_, next_);
        }
        read_levels(levels);
    }

  private:
    // Distinct numbers in order, and sums over those before i: mass_[i] of the weights, moment_[i] of weight * number.
    void gather(const float* values, const float* weights) {
        std::iota(order_.begin(), order_.end(), 0);
        std::sort(order_.begin(), order_.end(), [values](int32_t a, int32_t b) {
            return values[a] < values[b] || (values[a] == values[b] && a < b);
        });
        const double largest = *std::max_element(weights, weights + n_);
        const double unit = largest > 0 ? 1 / largest : 0;
        count_ = 0;
        mass_[0] = moment_[0] = 0;
        for (size_t i = 0; i < n_; ++i) {
            const double value = values[order_[i]];
            const double weight = std::max(weights[order_[i]] * unit, weight_floor);
            if (count_ == 0 || value != value_[count_ - 1]) {
                value_[count_++] = value;
                mass_[count_] = mass_[count_ - 1];
                moment_[count_] = moment_[count_ - 1];
            }
            mass_[count_] += weight;
            moment_[count_] += weight * value;
        }
    }

    // What one cell for the numbers begin..end-1 takes off their squared error.
    double gain_of(size_t begin, size_t end) const {
        const double mass = mass_[end] - mass_[begin], moment = moment_[end] - moment_[begin];
        return mass > 0 ? moment * moment / mass : 0;
    }

    // next_[i] and first[i], where the last cell begins, for begin <= i <= end numbers covered, the answers lying in
    // low..high. before: the same of the layer of one cell less, which covers begin - 1 to end - 1 numbers.
    void layer(const int32_t* before, int32_t* first, size_t begin, size_t end, size_t low, size_t high) {
        const size_t i = begin + (end - begin) / 2;
        const size_t to = std::min(high, i - 1);
        const size_t from = std::min(std::max(low, static_cast<size_t>(before[i - 1])), to);
        const double mass = mass_[i], moment = moment_[i];
        double best = -1;
        size_t at = from;
        for (size_t j = from; j <= to; ++j) {
            const double m = mass - mass_[j], s = moment - moment_[j];
            const double gain = gain_[j] + (m > 0 ? s * s / m : 0);
            if (gain > best) {
                best = gain;
                at = j;
            }
        }
        next_[i] = best;
        first[i] = static_cast<int32_t>(at);
        if (begin < i)
            layer(before, first, begin, i - 1, low, at);
        if (i < end)
            layer(before, first, i + 1, end, at, high);
    }

    void read_levels(float* levels) const {
        size_t end = count_;
        for (size_t k = entries_; k-- > 0;) {
            const auto begin = static_cast<size_t>(first_[k * (n_ + 1) + end]);
            const double mass = mass_[end] - mass_[begin];
            const double mean = mass > 0 ? (moment_[end] - moment_[begin]) / mass : value_[begin];
            levels[k] = static_cast<float>(std::clamp(mean, value_[begin], value_[end - 1])); // rounding stays inside
            end = begin;
        }
    }

    size_t n_, entries_, count_ = 0;
    std::vector<int32_t> order_;
    std::vector<double> value_, mass_, moment_;
    std::vector<double> gain_, next_; // by numbers covered: the most that the cells of this layer, the next, take off
    std::vector<int32_t> first_;      // [entries, n + 1]: where the last cell begins, by numbers covered
};

} // namespace

void kmeans_rows(const float* values, const float* weights, int64_t rows, int64_t n, int64_t entries, float* levels,
                 int threads) {
    if (rows < 1 || n < 1 || entries < 1 || n > INT32_MAX)
        throw std::invalid_argument("kmeans: " + std::to_string(entries) + " levels for each row of [" +
                                    std::to_string(rows) + ", " + std::to_string(n) + "]");
    struct Call {
        const float *values, *weights;
        int64_t n, entries;
        float* levels;
    } call{values, weights, n, entries, levels};
    parallel_for(
        rows, threads,
        [](void* context, int64_t begin, int64_t end) {
            const Call& c = *static_cast<Call*>(context);
            Row row(c.n, c.entries);
            for (int64_t r = begin; r < end; ++r)
                row.solve(c.values + r * c.n, c.weights + r * c.n, c.levels + r * c.entries);
        },
        &call);
}

} // namespace bitpalette
