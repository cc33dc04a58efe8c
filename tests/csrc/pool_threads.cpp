// The pool of threads, and native code that several threads call at the same time, for a build with ThreadSanitizer.
// OpenMP runtimes are not built for it, so the pool is that of threads of our own (cpu/thread_pool.h).
#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu/codes.h"
#include "cpu/dense_weight.h"
#include "cpu/input_transform.h"
#include "cpu/int8.h"
#include "cpu/kmeans.h"
#include "cpu/parallel.h"
#include "cpu/trellis_encode.h"
#include "cpu/trellis_linear.h"
#include "exact_block.h"

using namespace bitpalette;

namespace {

constexpr int callers = 4;

// call(0..callers-1) at the same time, each on a thread of its own.
void at_once(const std::function<void(int)>& call) {
    std::vector<std::thread> threads;
    for (int i = 0; i < callers; ++i)
        threads.emplace_back(call, i);
    for (std::thread& thread : threads)
        thread.join();
}

struct Visits {
    std::vector<int> times;
    std::vector<std::thread::id> by;
};

// How often each number below n is visited, and by whom. Plain memory: two threads at one number are a race.
Visits visits(int64_t n, int threads) {
    Visits v{std::vector<int>(static_cast<size_t>(n)), std::vector<std::thread::id>(static_cast<size_t>(n))};
    parallel_for(
        n, threads,
        [](void* context, int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                ++static_cast<Visits*>(context)->times[static_cast<size_t>(i)];
                static_cast<Visits*>(context)->by[static_cast<size_t>(i)] = std::this_thread::get_id();
            }
        },
        &v);
    for (const int times : v.times)
        if (times != 1)
            fail("a number below " + std::to_string(n) + " was visited " + std::to_string(times) + " times");
    return v;
}

void check_ranges() {
    for (const int64_t n : {0, 1, 2, 3, 7, 64, 1000})
        for (const int threads : {-1, 0, 1, 2, 3, 5, 8})
            visits(n, threads);
    const Visits first = visits(100, 4);
    if (std::count(first.by.begin(), first.by.end(), std::this_thread::get_id()) != 25)
        fail("the calling thread has not a quarter of the work of four");
    for (int i = 0; i < 200; ++i) {
        visits(i % 7, i % 5);
        if (visits(100, 4).by != first.by)
            fail("a range has changed its thread");
    }
}

void check_sleep() {
    for (const int milliseconds : {0, 1, 5}) { // awake, at about the time it goes to sleep, and asleep
        std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
        visits(10, 3);
    }
    for (int i = 0; i < 300; ++i) {
        std::this_thread::sleep_for(std::chrono::microseconds(80 + i % 40)); // just then
        visits(10, 3);
    }
}

void check_exceptions() {
    for (const int64_t bad : {0, 99}) { // on the calling thread, on another
        bool caught = false;
        try {
            parallel_for(
                100, 4,
                [](void* context, int64_t begin, int64_t end) {
                    const int64_t at = *static_cast<const int64_t*>(context);
                    if (begin <= at && at < end)
                        throw std::runtime_error("from within");
                },
                const_cast<int64_t*>(&bad));
        } catch (const std::runtime_error& error) {
            caught = std::string(error.what()) == "from within";
        }
        if (!caught)
            fail("an exception of a range is lost");
        visits(100, 4);
    }
}

void check_nested() {
    std::atomic<int64_t> total{0};
    parallel_for(
        8, 4,
        [](void* context, int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const Visits inner = visits(10, 4);
                if (std::count(inner.by.begin(), inner.by.end(), std::this_thread::get_id()) != 10)
                    fail("a nested call left its thread");
                *static_cast<std::atomic<int64_t>*>(context) += 10;
            }
        },
        &total);
    if (total.load() != 80)
        fail("nested calls have done " + std::to_string(total.load()) + " of 80");
}

// Weights of all kinds on one input.
class Layers {
  public:
    static constexpr int64_t out = 80, in = 512;

    explicit Layers(Isa isa) : isa_(isa) {
        Numbers numbers(3);
        codes_ = numbers.bytes(out * in);
        scale_ = numbers.scales(out * (in / 32), 0.05f);
        dense_ = numbers.floats(out * in);
        factors_ = numbers.floats(in);
        CodesParts parts{};
        parts.codes = codes_.data(), parts.scale = scale_.data();
        parts.bits = 4, parts.out = out, parts.in = in, parts.group_size = 64;
        weights_.push_back(std::make_unique<CodesWeight>(isa, InputForm::int8_by_32, parts));
        weights_.push_back(std::make_unique<CodesWeight>(isa, InputForm::f32, parts));
        weights_.push_back(
            std::make_unique<Int8Weight>(isa, InputForm::int8_by_32, codes_.data(), scale_.data(), out, in));
        weights_.push_back(std::make_unique<DenseWeight>(isa, dense_.data(), Dtype::f32, out, in));
        for (const InputForm form : {InputForm::int8_by_256, InputForm::int16_by_256})
            weights_.push_back(
                std::make_unique<TrellisLinear>(isa, form, codes_.data(), scale_.data(), out, in, TrellisCode{40, 12}));
        transform_ = std::make_unique<InputTransform>(isa, in);
        transform_->add_multiply(factors_.data());
        transform_->add_rotate();
    }

    // All outputs of an input of `tokens` tokens that `seed` decides, alone and as one group.
    std::vector<float> run(uint32_t seed, int64_t tokens, int threads) const {
        Numbers numbers(seed);
        const Exact<float> x = numbers.floats(tokens * in);
        const size_t n = static_cast<size_t>(tokens * out);
        std::vector<float> y(n * weights_.size() * 2);
        Activations input(isa_);
        std::vector<LinearOutput> all;
        for (size_t i = 0; i < weights_.size(); ++i) {
            const LinearOutput one{weights_[i].get(), y.data() + n * i, out};
            input.set(x.data(), Dtype::f32, tokens, in, transform_.get(), threads);
            linear_group(&one, 1, input, threads);
            all.push_back({weights_[i].get(), y.data() + n * (weights_.size() + i), out});
        }
        input.set(x.data(), Dtype::f32, tokens, in, transform_.get(), threads);
        linear_group(all.data(), static_cast<int>(all.size()), input, threads);
        return y;
    }

  private:
    Isa isa_;
    Exact<uint8_t> codes_;
    Exact<uint16_t> scale_;
    Exact<float> dense_, factors_;
    std::vector<std::unique_ptr<LinearWeight>> weights_;
    std::unique_ptr<InputTransform> transform_;
};

void check_layers(Isa isa) {
    const Layers layers(isa);
    for (const int64_t tokens : {4, 9}) { // all together are enough for several threads
        std::vector<std::vector<float>> expected;
        for (uint32_t i = 0; i < callers; ++i)
            expected.push_back(layers.run(i, tokens, 1));
        at_once([&](int i) {
            for (int turn = 0; turn < 2; ++turn)
                if (layers.run(static_cast<uint32_t>(i), tokens, 3) != expected[static_cast<size_t>(i)])
                    fail(std::string("several threads get other outputs than one on ") + isa_name(isa));
        });
    }
}

// What keeps tables for all callers, called by all for the first time.
void check_tables(Isa isa) {
    Numbers numbers(6);
    const int64_t tiles = 3, rows = 4, n = 20, entries = 4;
    const Exact<float> x = numbers.floats(tiles * trellis_weights), values = numbers.floats(rows * n);
    const Exact<float> weights(rows * n);
    for (int64_t i = 0; i < rows * n; ++i)
        weights.data()[i] = 1.0f;
    std::vector<std::vector<uint8_t>> codes(callers);
    std::vector<std::vector<float>> levels(callers), rotated(callers);
    at_once([&](int caller) {
        const TrellisCode code{24, 12};
        const size_t i = static_cast<size_t>(caller);
        codes[i].resize(static_cast<size_t>(tiles * code.bytes()));
        trellis_encode(isa, x.data(), tiles, code, codes[i].data(), nullptr, 2);
        levels[i].resize(static_cast<size_t>(rows * entries));
        kmeans_rows(values.data(), weights.data(), rows, n, entries, levels[i].data(), 2);
        InputTransform transform(isa, 72);
        transform.add_rotate();
        rotated[i].resize(72);
        transform.apply_rows(x.data(), rotated[i].data(), 1, 2);
    });
    for (size_t i = 1; i < callers; ++i)
        if (codes[i] != codes[0] || levels[i] != levels[0] || rotated[i] != rotated[0])
            fail("threads that call at the same time get different results");
}

} // namespace

int main() {
    check_ranges();
    check_sleep();
    check_exceptions();
    check_nested();
    at_once([](int) {
        for (int i = 0; i < 300; ++i)
            visits(i, 1 + i % 4);
    });
    at_once([](int) { check_exceptions(); });
    for (int i = 0; i < isa_count; ++i)
        if (isa_available(static_cast<Isa>(i)))
            check_tables(static_cast<Isa>(i));
    for (const Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512})
        if (isa_available(isa))
            check_layers(isa);
    std::printf("clean\n");
    return 0;
}
