// Attention over the paged cache, and appending to it.
#include "../cpu/kv_append.h"
#include "../cpu/kv_attention.h"
#include "bind.h"

namespace py = pybind11;

namespace bitpalette {
namespace {

// (address of keys, of values, their strides [batch, token, head] each, addresses of lengths and first, slots); empty:
// no tokens
KvDense dense_from(const py::tuple& t) {
    if (t.empty())
        return {};
    if (t.size() != 11)
        throw std::invalid_argument("kv attention: dense tokens are 11 numbers, not " + std::to_string(t.size()));
    const auto number = [&](size_t i) { return t[i].cast<int64_t>(); };
    return {at<const void>(t[0].cast<uintptr_t>()),
            at<const void>(t[1].cast<uintptr_t>()),
            number(2),
            number(3),
            number(4),
            number(5),
            number(6),
            number(7),
            at<const int32_t>(t[8].cast<uintptr_t>()),
            at<const int32_t>(t[9].cast<uintptr_t>()),
            number(10)};
}

KvTokens tokens_from(uintptr_t x, int dtype, int64_t token_stride, int64_t head_stride, int64_t tokens, int64_t heads,
                     int64_t width, uintptr_t mean, bool rotate) {
    return {at<const void>(x),
            dtype_from_index(dtype),
            token_stride,
            head_stride,
            tokens,
            heads,
            width,
            at<const float>(mean),
            rotate};
}

} // namespace

void bind_kv(py::module_& m) {
    m.attr("kv_page") = kv_page;
    m.attr("kv_most_tokens") = kv_most_tokens;
    m.def(
        "kv_attention",
        [](int isa, uintptr_t k_codes, uintptr_t v_codes, uintptr_t k_gain, uintptr_t v_gain, int bits_k, int bits_v,
           uintptr_t block_table, int64_t table_row, uintptr_t lengths, const py::tuple& sinks, const py::tuple& window,
           const py::tuple& fresh, int dense_dtype, uintptr_t start, int64_t batch, int64_t kv_heads, int64_t group,
           int64_t tokens, int64_t head_dim, int64_t head_dim_v, float scale, float softcap, int64_t sliding_window,
           uintptr_t sink_logits, bool exact, uintptr_t q, int q_dtype, uintptr_t out, int out_dtype, int threads) {
            const Isa set = isa_from_index(isa);
            const KvAttentionCall call{at<const uint8_t>(k_codes),
                                       at<const uint8_t>(v_codes),
                                       at<const uint16_t>(k_gain),
                                       at<const uint16_t>(v_gain),
                                       bits_k,
                                       bits_v,
                                       at<const int32_t>(block_table),
                                       table_row,
                                       at<const int32_t>(lengths),
                                       dense_from(sinks),
                                       dense_from(window),
                                       dense_from(fresh),
                                       dtype_from_index(dense_dtype),
                                       at<const int32_t>(start),
                                       batch,
                                       kv_heads,
                                       group,
                                       tokens,
                                       head_dim,
                                       head_dim_v,
                                       scale,
                                       softcap,
                                       sliding_window,
                                       at<const float>(sink_logits),
                                       exact,
                                       at<const void>(q),
                                       dtype_from_index(q_dtype),
                                       at<void>(out),
                                       dtype_from_index(out_dtype)};
            const py::gil_scoped_release unlocked;
            attend_pages(set, call, threads);
        },
        "See csrc/cpu/kv_attention.h; tensors come as addresses.", py::arg("isa"), py::kw_only(), py::arg("k_codes"),
        py::arg("v_codes"), py::arg("k_gain"), py::arg("v_gain"), py::arg("bits_k"), py::arg("bits_v"),
        py::arg("block_table"), py::arg("table_row"), py::arg("lengths"), py::arg("sinks"), py::arg("window"),
        py::arg("fresh"), py::arg("dense_dtype"), py::arg("start"), py::arg("batch"), py::arg("kv_heads"),
        py::arg("group"), py::arg("tokens"), py::arg("head_dim"), py::arg("head_dim_v"), py::arg("scale"),
        py::arg("softcap"), py::arg("sliding_window"), py::arg("sink_logits"), py::arg("exact"), py::arg("q"),
        py::arg("q_dtype"), py::arg("out"), py::arg("out_dtype"), py::arg("threads"));
    m.def(
        "kv_append",
        [](int isa, uintptr_t x, int dtype, int64_t token_stride, int64_t head_stride, int64_t tokens, int64_t heads,
           int64_t width, uintptr_t mean, bool rotate, uintptr_t codes, uintptr_t gain, int64_t pages, int bits,
           bool unbiased, uintptr_t slots, int threads) {
            const Isa set = isa_from_index(isa);
            const KvTokens from = tokens_from(x, dtype, token_stride, head_stride, tokens, heads, width, mean, rotate);
            const KvPages to{at<uint8_t>(codes), at<uint16_t>(gain), pages, bits, unbiased, at<const int64_t>(slots)};
            const py::gil_scoped_release unlocked;
            append_tokens(set, from, to, threads);
        },
        "See csrc/cpu/kv_append.h.", py::arg("isa"), py::kw_only(), py::arg("x"), py::arg("dtype"),
        py::arg("token_stride"), py::arg("head_stride"), py::arg("tokens"), py::arg("heads"), py::arg("width"),
        py::arg("mean"), py::arg("rotate"), py::arg("codes"), py::arg("gain"), py::arg("pages"), py::arg("bits"),
        py::arg("unbiased"), py::arg("slots"), py::arg("threads"));
    m.def(
        "kv_rotate",
        [](int isa, uintptr_t x, int dtype, int64_t token_stride, int64_t head_stride, int64_t tokens, int64_t heads,
           int64_t width, uintptr_t mean, uintptr_t z, int z_dtype, int threads) {
            const Isa set = isa_from_index(isa);
            const KvTokens from = tokens_from(x, dtype, token_stride, head_stride, tokens, heads, width, mean, true);
            const Dtype type = dtype_from_index(z_dtype);
            const py::gil_scoped_release unlocked;
            rotate_tokens(set, from, type, at<void>(z), threads);
        },
        "See csrc/cpu/kv_append.h.", py::arg("isa"), py::kw_only(), py::arg("x"), py::arg("dtype"),
        py::arg("token_stride"), py::arg("head_stride"), py::arg("tokens"), py::arg("heads"), py::arg("width"),
        py::arg("mean"), py::arg("z"), py::arg("z_dtype"), py::arg("threads"));
}

} // namespace bitpalette
