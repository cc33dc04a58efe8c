// The part of bitpalette._cuda that serves the packed KV cache; kernels/kv_cuda.py is the caller.
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../cuda/kv_append.cuh"
#include "../cuda/kv_attention.cuh"
#include "../cuda/launch.cuh"

namespace py = pybind11;
using namespace pybind11::literals;

namespace bitpalette {
namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Dtype dtype_of(int index) {
    if (index < 0 || index > 2)
        throw std::invalid_argument("no dtype " + std::to_string(index));
    return static_cast<Dtype>(index);
}

void require(int error, const char* what) {
    if (error)
        throw std::runtime_error(std::string(what) + ": " + error_text(error));
}

// matrix: DHT of the odd part of width, or null where that is 1.
KvRotation rotation_of(int width, uintptr_t matrix) {
    KvRotation r = {at<const float>(matrix), width, 0, 1};
    for (; r.odd > 1 && r.odd % 2 == 0; r.odd /= 2)
        ++r.log2;
    r.unit = static_cast<float>(1 / std::sqrt(std::ldexp(1.0, r.log2)));
    return r;
}

// keys, values, strides of keys and values, lengths, first, slots; or nothing
KvDense dense_of(const py::tuple& t) {
    KvDense d = {};
    if (t.empty())
        return d;
    d.keys = at<const void>(t[0].cast<uintptr_t>());
    d.values = at<const void>(t[1].cast<uintptr_t>());
    int64_t* strides[] = {&d.key_batch, &d.key_token, &d.key_head, &d.value_batch, &d.value_token, &d.value_head};
    for (size_t i = 0; i < 6; ++i)
        *strides[i] = t[2 + i].cast<int64_t>();
    d.lengths = at<const int32_t>(t[8].cast<uintptr_t>());
    d.first = at<const int32_t>(t[9].cast<uintptr_t>());
    d.slots = t[10].cast<int>();
    return d;
}

void attention(const py::kwargs& given) {
    const auto address = [&](const char* name) { return given[name].cast<uintptr_t>(); };
    const auto number = [&](const char* name) { return given[name].cast<int>(); };
    const auto real = [&](const char* name) { return given[name].cast<float>(); };
    KvAttentionArgs a = {};
    a.k_codes = at<const uint8_t>(address("k_codes"));
    a.v_codes = at<const uint8_t>(address("v_codes"));
    a.k_gain = at<const uint16_t>(address("k_gain"));
    a.v_gain = at<const uint16_t>(address("v_gain"));
    a.bits_k = number("bits_k");
    a.bits_v = number("bits_v");
    a.block_table = at<const int32_t>(address("block_table"));
    a.table_row = number("table_row");
    a.lengths = at<const int32_t>(address("lengths"));
    const char* pieces[] = {"sinks", "window", "fresh"};
    for (size_t i = 0; i < 3; ++i)
        a.dense[i] = dense_of(given[pieces[i]].cast<py::tuple>());
    a.dense_dtype = dtype_of(number("dense_dtype"));
    a.start = at<const int32_t>(address("start"));
    a.batch = number("batch");
    a.kv_heads = number("kv_heads");
    a.group = number("group");
    a.tokens = number("tokens");
    a.head_dim = number("head_dim");
    a.head_dim_v = number("head_dim_v");
    a.scale = real("scale");
    a.softcap = real("softcap");
    a.sliding_window = number("sliding_window");
    a.sink_logits = at<const float>(address("sink_logits"));
    a.q = at<const void>(address("q"));
    a.q_dtype = dtype_of(number("q_dtype"));
    a.rotate_q = a.rotate_out = given["rotate"].cast<bool>();
    a.rotation_q = rotation_of(a.head_dim, address("matrix_k"));
    a.rotation_out = rotation_of(a.head_dim_v, address("matrix_v"));
    a.out = at<void>(address("out"));
    a.out_dtype = dtype_of(number("out_dtype"));
    a.splits = number("splits");
    a.dense_splits = number("dense_splits");
    a.parts = at<float>(address("parts"));
    require(kv_attention(a, number("shared_limit"), at<void>(address("stream"))), "attention over a KV cache");
}

KvTokens tokens_of(uintptr_t x, int dtype, int64_t token_stride, int64_t head_stride, int64_t tokens, int heads,
                   int width, uintptr_t mean, bool rotate, uintptr_t matrix) {
    return {at<const void>(x),
            dtype_of(dtype),
            token_stride,
            head_stride,
            tokens,
            heads,
            width,
            at<const float>(mean),
            rotate,
            rotation_of(width, matrix)};
}

void append(uintptr_t x, int dtype, int64_t token_stride, int64_t head_stride, int64_t tokens, int heads, int width,
            uintptr_t mean, bool rotate, uintptr_t matrix, uintptr_t codes, uintptr_t gain, int64_t pages, int bits,
            bool unbiased, float step, uintptr_t slots, uintptr_t stream) {
    const KvAppendArgs args = {
        tokens_of(x, dtype, token_stride, head_stride, tokens, heads, width, mean, rotate, matrix),
        at<uint8_t>(codes),
        at<uint16_t>(gain),
        pages,
        bits,
        unbiased,
        step,
        at<const int64_t>(slots)};
    require(kv_append(args, at<void>(stream)), "appending to a KV cache");
}

void rotate(uintptr_t x, int dtype, int64_t token_stride, int64_t head_stride, int64_t tokens, int heads, int width,
            uintptr_t mean, uintptr_t matrix, uintptr_t z, int z_dtype, uintptr_t stream) {
    const KvRotateArgs args = {tokens_of(x, dtype, token_stride, head_stride, tokens, heads, width, mean, true, matrix),
                               at<void>(z), dtype_of(z_dtype)};
    require(kv_rotate(args, at<void>(stream)), "rotating tokens of a KV cache");
}

} // namespace

void bind_cuda_kv(py::module_& m) {
    m.def("kv_attention", &attention);
    m.def("kv_append", &append, py::kw_only(), "x"_a, "dtype"_a, "token_stride"_a, "head_stride"_a, "tokens"_a,
          "heads"_a, "width"_a, "mean"_a, "rotate"_a, "matrix"_a, "codes"_a, "gain"_a, "pages"_a, "bits"_a,
          "unbiased"_a, "step"_a, "slots"_a, "stream"_a);
    m.def("kv_rotate", &rotate, py::kw_only(), "x"_a, "dtype"_a, "token_stride"_a, "head_stride"_a, "tokens"_a,
          "heads"_a, "width"_a, "mean"_a, "matrix"_a, "z"_a, "z_dtype"_a, "stream"_a);
}

} // namespace bitpalette
