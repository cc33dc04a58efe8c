#include "linear.h"

#include <algorithm>
#include <deque>
#include <stdexcept>
#include <string>
#include <vector>

#include "activations_ops.h"
#include "panel_gemm.h"
#include "parallel.h"

namespace bitpalette {
namespace {

// Below this much work a thread, a second thread costs more than it saves. Measured at 4 bits on two cores at 2.8 GHz,
// codes in the cache: two threads take as long as one from 8 to 10 us on, which is where one reads 290 KiB for a token.
constexpr int64_t bytes_per_thread = 160 << 10;
constexpr int64_t weights_per_thread = 64 << 10; // of decoding, which does not end in a sum

int worth_waking(int64_t work, int64_t each, int threads) {
    return static_cast<int>(std::clamp<int64_t>(work / each, 1, std::max(threads, 1)));
}

// In bytes of one token; 8 tokens take 4 to 5 times as long as one, since codes are decoded once for all.
int64_t work_of(int64_t bytes, int64_t tokens) {
    return bytes * (1 + tokens) / 2;
}

// Of one weight, in blocks of rows or in tiles.
struct Job {
    LinearOutput output;
    const PanelInput* panel; // null: as it is for few tokens
    int64_t count;
};

} // namespace

void LinearWeight::unpack(int64_t, int64_t, int64_t, const PanelBlock&) const {
    throw std::logic_error("a weight without a panel is not unpacked");
}

void linear_group(const LinearOutput* outputs, int n, Activations& x, int threads) {
    thread_local std::vector<Job> jobs;          // both are kept from call to call
    thread_local std::deque<PanelInput> ordered; // jobs point into it
    jobs.clear();
    size_t inputs = 0;
    int64_t count = 0, bytes = 0;
    for (int i = 0; i < n; ++i) {
        const LinearWeight& w = *outputs[i].weight;
        if (w.in != x.in())
            throw std::invalid_argument("a weight takes " + std::to_string(w.in) + " features in, got " +
                                        std::to_string(x.in()));
        Job job{outputs[i], nullptr, w.blocks()};
        if (w.panel() != nullptr && x.tokens() >= w.panel()->fewest_tokens) {
            const auto end = ordered.begin() + static_cast<std::ptrdiff_t>(inputs);
            auto input = std::find_if(ordered.begin(), end, [&](const auto& o) { return o.serves(*w.panel()); });
            if (input == end) {
                if (++inputs > ordered.size())
                    ordered.emplace_back();
                input = ordered.begin() + static_cast<std::ptrdiff_t>(inputs) - 1;
                input->set(x, *w.panel(), threads);
            }
            job.panel = &*input;
            job.count = panel_tiles(w);
        } else {
            x.need(w.form(), threads);
        }
        jobs.push_back(job);
        count += job.count;
        bytes += w.bytes();
    }
    struct Call {
        const Job* jobs;
        const Activations& x;
    } call{jobs.data(), x};
    const auto body = [](void* context, int64_t begin, int64_t end) {
        const Call& c = *static_cast<const Call*>(context);
        int64_t first = 0; // of the present job, counted over all
        for (const Job* job = c.jobs; first < end; first += job->count, ++job) {
            const int64_t from = std::max(begin, first) - first, to = std::min(end - first, job->count);
            const LinearOutput& o = job->output;
            if (from < to && job->panel != nullptr)
                panel_multiply(*o.weight, *job->panel, o.y, o.y_row, from, to);
            else if (from < to)
                o.weight->multiply(c.x, o.y, o.y_row, from, to);
        }
    };
    parallel_for(count, worth_waking(work_of(bytes, x.tokens()), bytes_per_thread, threads), body, &call);
}

void linear_rows(const LinearWeight& w, const int64_t* index, int64_t n, float* rows, int threads) {
    for (int64_t i = 0; i < n; ++i)
        if (index[i] < 0 || index[i] >= w.out)
            throw std::invalid_argument("row " + std::to_string(index[i]) + " of a weight with " +
                                        std::to_string(w.out));
    struct Call {
        const LinearWeight& w;
        const int64_t* index;
        float* rows;
    } call{w, index, rows};
    const auto body = [](void* context, int64_t begin, int64_t end) {
        const Call& c = *static_cast<const Call*>(context);
        c.w.decode(c.index, begin, end, c.rows);
    };
    parallel_for(n, worth_waking(n * w.in, weights_per_thread, threads), body, &call);
}

void store_outputs(Isa isa, const float* from, int64_t from_row, int64_t tokens, int64_t out, const void* bias,
                   Dtype dtype, void* y) {
    const ActivationOps& ops = activation_ops(isa);
    const int64_t bytes_a_row = out * (dtype == Dtype::f32 ? 4 : 2);
    for (int64_t t = 0; t < tokens; ++t)
        ops.store(from + t * from_row, bias, dtype, out, static_cast<char*>(y) + t * bytes_a_row);
}

} // namespace bitpalette
