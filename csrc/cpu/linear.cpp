#include "linear.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "activations_ops.h"
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

} // namespace

void linear_group(const LinearOutput* outputs, int n, Activations& x, int threads) {
    int64_t blocks = 0, bytes = 0;
    for (int i = 0; i < n; ++i) {
        if (outputs[i].weight->in != x.in())
            throw std::invalid_argument("a weight takes " + std::to_string(outputs[i].weight->in) +
                                        " features in, got " + std::to_string(x.in()));
        x.need(outputs[i].weight->form(), threads);
        blocks += outputs[i].weight->blocks();
        bytes += outputs[i].weight->bytes();
    }
    struct Call {
        const LinearOutput* outputs;
        const Activations& x;
    } call{outputs, x};
    const auto body = [](void* context, int64_t begin, int64_t end) {
        const Call& c = *static_cast<const Call*>(context);
        int64_t first = 0; // block of the present weight, counted over all
        for (const LinearOutput* o = c.outputs; first < end; ++o) {
            const int64_t from = std::max(begin, first) - first;
            const int64_t to = std::min(end - first, o->weight->blocks());
            if (from < to)
                o->weight->multiply(c.x, o->y, o->y_row, from, to);
            first += o->weight->blocks();
        }
    };
    parallel_for(blocks, worth_waking(work_of(bytes, x.tokens()), bytes_per_thread, threads), body, &call);
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
