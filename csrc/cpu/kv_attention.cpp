#include "kv_attention.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "half.h"
#include "kv_softmax.h"
#include "parallel.h"

namespace bitpalette {
namespace {

constexpr int64_t value_lanes = 16;
constexpr size_t line = 64;

const KvAttentionUnit& unit_of(Isa isa) {
    if (!isa_available(isa))
        throw std::invalid_argument(std::string("this machine has no ") + isa_name(isa));
#if BITPALETTE_X86
    if (plain_isa(isa) == Isa::avx512)
        return kv_attention_avx512;
#if BITPALETTE_AVXVNNI
    if (isa == Isa::avxvnni)
        return kv_attention_avxvnni;
#endif
    if (plain_isa(isa) == Isa::avx2)
        return kv_attention_avx2;
#endif
#if BITPALETTE_AARCH64
    if (isa == Isa::neon)
        return kv_attention_neon;
#endif
    return kv_attention_scalar;
}

void check(const KvAttentionCall& c) {
    const auto refuse = [](const std::string& what) { throw std::invalid_argument("kv attention: " + what); };
    for (const int bits : {c.bits_k, c.bits_v})
        if (bits != 2 && bits != 3 && bits != 4 && bits != 8)
            refuse(std::to_string(bits) + " bits; 2, 3, 4 and 8 have a kernel");
    if (c.batch < 1 || c.kv_heads < 1 || c.group < 1)
        refuse(std::to_string(c.batch) + " rows of " + std::to_string(c.group) + " times " +
               std::to_string(c.kv_heads) + " heads");
    if (c.tokens < 1 || c.tokens > kv_most_tokens)
        refuse(std::to_string(c.tokens) + " new tokens; 1 to " + std::to_string(kv_most_tokens) + " at a time");
    for (const int64_t width : {c.head_dim, c.head_dim_v})
        if (width < 8 || width % 8 != 0)
            refuse("a head_dim of " + std::to_string(width) + ", not a multiple of 8");
    for (int64_t row = 0; row < c.batch; ++row) {
        const KvSpan s = kv_span(c, row);
        if (s.sinks < 0 || s.pages < 0 || s.window < 0 || s.fresh < 0 || s.start < 0)
            refuse("row " + std::to_string(row) + " has " + std::to_string(s.sinks) + " + " + std::to_string(s.pages) +
                   " + " + std::to_string(s.window) + " + " + std::to_string(s.fresh) + " tokens and starts at " +
                   std::to_string(s.start));
        for (const KvDense* d : {&c.sinks, &c.window, &c.fresh})
            if (d->lengths != nullptr && d->lengths[row] > 0) {
                const int64_t length = d->lengths[row], first = d->first == nullptr ? 0 : d->first[row];
                if (length > d->slots || first < 0 || first >= d->slots)
                    refuse("row " + std::to_string(row) + " has " + std::to_string(length) + " tokens from slot " +
                           std::to_string(first) + " on, of " + std::to_string(d->slots) + " slots");
            }
        if (s.pages > c.table_row * kv_page)
            refuse("row " + std::to_string(row) + " has " + std::to_string(s.pages) + " tokens in " +
                   std::to_string(c.table_row) + " pages of " + std::to_string(kv_page));
    }
}

// Queries in the forms that units read, of all rows and heads.
class Queries {
  public:
    Queries(const KvAttentionCall& c)
        : rows_(c.group * c.tokens), planes_(c.exact ? 2 : 1),
          quads_(kv_words(c.head_dim, c.bits_k) * kv_codes_of_byte(c.bits_k)),
          value_row_((c.head_dim + value_lanes - 1) / value_lanes * value_lanes) {
        const auto all = static_cast<size_t>(c.batch * c.kv_heads * rows_);
        values_.assign(all * static_cast<size_t>(value_row_), 0.0f);
        codes_.resize(all * static_cast<size_t>(planes_ * 4 * quads_));
        scale_.resize(all);
        sum_.resize(all);
        std::vector<int32_t> element(static_cast<size_t>(4 * quads_)); // of each byte; past the last: a zero
        for (int64_t i = 0; i < 4 * quads_; ++i)
            element[static_cast<size_t>(i)] =
                static_cast<int32_t>(std::min(kv_key_element(i / 4, i % 4, c.bits_k), c.head_dim));
        std::vector<float> high(static_cast<size_t>(c.head_dim + 1)), low(high.size());
        for (size_t r = 0; r < all; ++r)
            set(c, r, element, high, low);
    }

    KvQueries of(int64_t head) const { // row * kv_heads + kv_head
        const int64_t r = head * rows_;
        return {values_.data() + r * value_row_,
                value_row_,
                codes_.data() + r * planes_ * 4 * quads_,
                planes_,
                quads_,
                scale_.data() + r,
                sum_.data() + r};
    }

  private:
    // Rows of q are [batch, heads, tokens] as ours are: the heads of a kv head lie together.
    void set(const KvAttentionCall& c, size_t r, const std::vector<int32_t>& element, std::vector<float>& high,
             std::vector<float>& low) {
        float* x = values_.data() + r * static_cast<size_t>(value_row_);
        float most = 0, total = 0;
        for (int64_t i = 0; i < c.head_dim; ++i) {
            x[i] = load_element(c.q, c.q_dtype, static_cast<int64_t>(r) * c.head_dim + i);
            most = std::max(most, std::fabs(x[i]));
            total += x[i];
        }
        const bool usable = most > 0 && std::isfinite(most) && !std::isnan(total);
        const float unit = most / 127, inverse = usable ? 127 / most : 0.0f, magic = 12582912.0f;
        double sum = 0;
        for (int64_t i = 0; i < c.head_dim; ++i) {
            const float scaled = usable && std::isfinite(inverse) ? x[i] * inverse : 0.0f;
            const float h = (scaled + magic) - magic; // 1.5 * 2^23 rounds to a whole number
            const float l = ((scaled - h) * 254 + magic) - magic;
            high[static_cast<size_t>(i)] = h, low[static_cast<size_t>(i)] = l;
            sum += planes_ == 2 ? static_cast<double>(h) + static_cast<double>(l) / 254 : static_cast<double>(h);
        }
        int8_t* to = codes_.data() + r * static_cast<size_t>(planes_ * 4 * quads_);
        for (const int32_t i : element)
            *to++ = static_cast<int8_t>(high[static_cast<size_t>(i)]);
        if (planes_ == 2)
            for (const int32_t i : element)
                *to++ = static_cast<int8_t>(low[static_cast<size_t>(i)]);
        // NaN or infinity in a query: NaN in all its scores
        scale_[r] = usable || total == 0 ? unit * c.scale : std::numeric_limits<float>::quiet_NaN();
        sum_[r] = static_cast<float>(sum);
    }

    int64_t rows_, planes_, quads_, value_row_;
    std::vector<float> values_, scale_, sum_;
    std::vector<int8_t> codes_;
};

struct Task {
    int64_t row, kv_head;
    int64_t first, last; // tokens in pages; last = 0: what is not in pages
};

// In the order in which their results are put together. Pages that nobody sees are in none.
std::vector<Task> tasks_of(const KvAttentionCall& c) {
    std::vector<Task> tasks;
    for (int64_t row = 0; row < c.batch; ++row) {
        const KvSpan s = kv_span(c, row);
        const int64_t oldest = std::max<int64_t>(seen_positions(s, 0).from - s.sinks, 0) / kv_page * kv_page;
        for (int64_t head = 0; head < c.kv_heads; ++head) {
            for (int64_t first = oldest; first < s.pages; first += kv_split_pages * kv_page)
                tasks.push_back({row, head, first, std::min(first + kv_split_pages * kv_page, s.pages)});
            tasks.push_back({row, head, 0, 0});
        }
    }
    return tasks;
}

struct Run {
    const KvAttentionCall& call;
    const KvAttentionUnit& unit;
    const Queries& queries;
    const std::vector<Task>& tasks;
    int64_t rows;
    float* partials; // [tasks, rows * (head_dim_v + 2)]

    KvPartial partial(int64_t task) const {
        float* sums = partials + task * rows * (call.head_dim_v + 2);
        return {sums, sums + rows * call.head_dim_v, sums + rows * (call.head_dim_v + 1)};
    }
};

void run_tasks(void* data, int64_t begin, int64_t end) {
    const Run& run = *static_cast<const Run*>(data);
    thread_local std::vector<uint8_t> room; // kept from call to call
    const auto bytes = static_cast<size_t>(run.unit.room(run.call));
    if (room.size() < bytes + line)
        room.resize(bytes + line);
    uint8_t* at = room.data() + (line - reinterpret_cast<uintptr_t>(room.data()) % line) % line;
    for (int64_t i = begin; i < end; ++i) {
        const Task& t = run.tasks[static_cast<size_t>(i)];
        const KvQueries queries = run.queries.of(t.row * run.call.kv_heads + t.kv_head);
        if (t.last == 0)
            run.unit.dense(run.call, queries, t.row, t.kv_head, at, run.partial(i));
        else
            run.unit.pages(run.call, queries, t.row, t.kv_head, t.first, t.last, at, run.partial(i));
    }
}

// Row r of the tasks first..last-1, which have the same queries.
void combine(const Run& run, int64_t first, int64_t last, int64_t r, const float* sink_logit, float* sums) {
    const int64_t width = run.call.head_dim_v;
    constexpr float nothing = -std::numeric_limits<float>::infinity();
    float most = sink_logit == nullptr ? nothing : *sink_logit, weight = 0;
    for (int64_t task = first; task < last; ++task)
        most = std::max(most, run.partial(task).most[r]);
    std::fill(sums, sums + width, 0.0f);
    for (int64_t task = first; task < last; ++task) {
        const KvPartial p = run.partial(task);
        if (p.most[r] == nothing && p.weight[r] == 0)
            continue;
        const float factor = std::exp(p.most[r] - most);
        weight += p.weight[r] * factor;
        for (int64_t i = 0; i < width; ++i)
            sums[i] += p.sums[r * width + i] * factor;
    }
    if (weight != 0 && sink_logit != nullptr)
        weight += std::exp(*sink_logit - most);
    const float share = weight == 0 ? 0.0f : 1 / weight;
    for (int64_t i = 0; i < width; ++i)
        sums[i] *= share;
}

} // namespace

void attend_pages(Isa isa, const KvAttentionCall& call, int threads) {
    check(call);
    const KvAttentionUnit& unit = unit_of(isa);
    const Queries queries(call);
    const std::vector<Task> tasks = tasks_of(call);
    const int64_t rows = call.group * call.tokens, width = call.head_dim_v;
    std::vector<float> partials(tasks.size() * static_cast<size_t>(rows * (width + 2)));
    Run run{call, unit, queries, tasks, rows, partials.data()};
    parallel_for(static_cast<int64_t>(tasks.size()), std::max(threads, 1), run_tasks, &run);
    std::vector<float> sums(static_cast<size_t>(width));
    for (size_t first = 0, last = 0; first < tasks.size(); first = last) {
        while (last < tasks.size() && tasks[last].row == tasks[first].row &&
               tasks[last].kv_head == tasks[first].kv_head)
            ++last;
        const int64_t head = tasks[first].row * call.kv_heads + tasks[first].kv_head;
        for (int64_t r = 0; r < rows; ++r) {
            const float* logit = call.sink_logits == nullptr
                                     ? nullptr
                                     : call.sink_logits + tasks[first].kv_head * call.group + r / call.tokens;
            combine(run, static_cast<int64_t>(first), static_cast<int64_t>(last), r, logit, sums.data());
            for (int64_t i = 0; i < width; ++i)
                store_element(call.out, call.out_dtype, (head * rows + r) * width + i, sums[static_cast<size_t>(i)]);
        }
    }
}

} // namespace bitpalette
