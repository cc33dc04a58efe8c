// The cache of a layer in one call a step: what is the same from token to token comes as a tuple that Python keeps.
#include <pybind11/pybind11.h>

#include "../cpu/kv_rows.h"
#include "bind.h"

namespace py = pybind11;

namespace bitpalette {
namespace {

struct Reader {
    const py::tuple& t;

    Reader(const py::tuple& from, size_t size, const char* what) : t(from) {
        if (t.size() != size)
            throw std::invalid_argument(std::string("kv rows: ") + what + " is " + std::to_string(size) +
                                        " numbers, not " + std::to_string(t.size()));
    }
    int64_t number(size_t i) const { return t[i].cast<int64_t>(); }
    template <class T>
    T* address(size_t i) const {
        return at<T>(t[i].cast<uintptr_t>());
    }
};

// (sinks, ring, codes, gain, bits, width)
KvRowsSide side_from(const py::tuple& tuple) {
    const Reader t(tuple, 6, "a side");
    return {t.address<void>(0),
            t.address<void>(1),
            t.address<uint8_t>(2),
            t.address<uint16_t>(3),
            static_cast<int>(t.number(4)),
            t.number(5)};
}

// (batch, heads, sinks, window, capacity, pages, dtype, block_table, its row, length, quantized, exact_from, claimed,
// mean, keys, values)
KvRows rows_from(const py::tuple& tuple) {
    const Reader t(tuple, 16, "a cache");
    return {t.number(0),
            t.number(1),
            t.number(2),
            t.number(3),
            t.number(4),
            t.number(5),
            dtype_from_index(static_cast<int>(t.number(6))),
            t.address<const int32_t>(7),
            t.number(8),
            t.address<int64_t>(9),
            t.address<int64_t>(10),
            t.address<int64_t>(11),
            t.address<const int64_t>(12),
            t.address<const float>(13),
            side_from(t.t[14].cast<py::tuple>()),
            side_from(t.t[15].cast<py::tuple>())};
}

// (address, strides of batch, token, head); empty: none
KvNew new_from(const py::tuple& tuple) {
    if (tuple.empty())
        return {};
    const Reader t(tuple, 4, "a side's new tokens");
    return {t.address<const void>(0), t.number(1), t.number(2), t.number(3)};
}

// (address, dtype, strides of batch, head, token, query heads of a kv head, tokens)
KvRowsQuery query_from(const py::tuple& tuple) {
    const Reader t(tuple, 7, "a query");
    KvRowsQuery query{};
    query.q = t.address<const void>(0);
    query.dtype = dtype_from_index(static_cast<int>(t.number(1)));
    query.batch_stride = t.number(2);
    query.head_stride = t.number(3);
    query.token_stride = t.number(4);
    query.group = t.number(5);
    query.tokens = t.number(6);
    return query;
}

} // namespace

void bind_kv_rows(py::module_& m) {
    m.def(
        "kv_store",
        [](int isa, const py::tuple& cache, const py::tuple& k, const py::tuple& v, int64_t tokens, uintptr_t stored_k,
           uintptr_t stored_v, int threads) {
            const Isa set = isa_from_index(isa);
            const KvRows rows = rows_from(cache);
            const KvNew new_k = new_from(k), new_v = new_from(v);
            const py::gil_scoped_release unlocked;
            store_tokens(set, rows, new_k, new_v, tokens, at<void>(stored_k), at<void>(stored_v), threads);
        },
        "See csrc/cpu/kv_rows.h.");
    m.def(
        "kv_append_rows",
        [](int isa, const py::tuple& cache, const py::tuple& k, const py::tuple& v, int64_t tokens, uintptr_t skip,
           int threads) {
            const Isa set = isa_from_index(isa);
            const KvRows rows = rows_from(cache);
            const KvNew new_k = new_from(k), new_v = new_from(v);
            const py::gil_scoped_release unlocked;
            return append_tokens_to_rows(set, rows, new_k, new_v, tokens, at<const int64_t>(skip), threads);
        },
        "See csrc/cpu/kv_rows.h.");
    m.def(
        "kv_attend_rows",
        [](int isa, const py::tuple& cache, const py::tuple& q, const py::tuple& k, const py::tuple& v, uintptr_t skip,
           float scale, float softcap, int64_t sliding_window, uintptr_t sink_logits, bool exact, uintptr_t out,
           int threads) {
            const Isa set = isa_from_index(isa);
            const KvRows rows = rows_from(cache);
            const KvNew new_k = new_from(k), new_v = new_from(v);
            KvRowsQuery query = query_from(q);
            query.scale = scale;
            query.softcap = softcap;
            query.sliding_window = sliding_window;
            query.sink_logits = at<const float>(sink_logits);
            query.exact = exact;
            query.out = at<void>(out);
            const py::gil_scoped_release unlocked;
            attend_rows(set, rows, query, new_k, new_v, at<const int64_t>(skip), threads);
        },
        "See csrc/cpu/kv_rows.h.");
}

} // namespace bitpalette
