// bitpalette._cuda: the CUDA kernels for Python. Tensors come as addresses of device memory and streams as handles; the
// caller (kernels/native_cuda.py) has checked devices, types and contiguity, made the device current and keeps the
// tensors alive. Nothing here allocates device memory or waits for the device.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../cuda/dequantize.cuh"
#include "../cuda/embedding.cuh"
#include "../cuda/gemm.h"
#include "../cuda/gemv_i8.cuh"
#include "../cuda/launch.cuh"
#include "../cuda/transform_input.cuh"

namespace py = pybind11;

namespace bitpalette {

void bind_cuda_kv(py::module_& m); // cuda_kv.cpp

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

// Where a GEMM's or a GEMV's input is, and its output.
struct Call {
    uintptr_t x, x_low, x_scale, x_sum, bias, y;
    int64_t x_stride; // bytes
    int tokens, x_bytes;
    int dtype; // of y, and of x with 16 bits
};

class PackedWeight {
  public:
    PackedWeight(int format, int64_t n, int64_t k, int group_size, int row_bits, int window, uintptr_t codes,
                 uintptr_t scale, uintptr_t zero_point, uintptr_t table, uintptr_t group_scale, uintptr_t group_offset)
        : weight_{static_cast<Format>(format),
                  at<const uint32_t>(codes),
                  at<const uint16_t>(scale),
                  at<const uint8_t>(zero_point),
                  at<const uint16_t>(table),
                  at<const uint8_t>(group_scale),
                  at<const uint8_t>(group_offset),
                  n,
                  k,
                  group_size,
                  row_bits,
                  window} {}

    GemmPlan plan(int tokens, int dtype, bool int8, bool batch_invariant) const {
        GemmPlan plan = {};
        const auto make = int8 ? plan_gemm_w4a8 : plan_gemm_w4a16;
        require(make({weight_, dtype_of(dtype), nullptr}, tokens, batch_invariant, 0, 0, &plan), "planning a GEMM");
        return plan;
    }

    void gemm(const GemmPlan& plan, bool int8, const Call& call, uintptr_t parts, uintptr_t counters,
              uintptr_t stream) const {
        const GemmWeight weight = {weight_, dtype_of(call.dtype), at<const void>(call.bias)};
        const GemmTokens tokens = {
            at<const void>(call.x),        call.x_stride, call.x_bytes,     at<const float>(call.x_scale),
            at<const int32_t>(call.x_sum), call.tokens,   at<void>(call.y), weight_.n};
        const auto run = int8 ? gemm_w4a8 : gemm_w4a16;
        require(run(weight, plan, tokens, at<void>(parts), at<void>(counters), at<void>(stream)), "a GEMM");
    }

    // (blocks, sums of 8 bytes, counters)
    std::tuple<int, int64_t, int64_t> plan_gemv(int tokens, bool planes) const {
        int blocks = 0;
        require(gemv_i8_resident_blocks(weight_.row_bits, tokens, planes, &blocks), "planning a GEMV");
        return {blocks, gemv_i8_sums(tokens, blocks), gemv_i8_counters(weight_.n)};
    }

    void gemv(int blocks, const Call& call, uintptr_t parts, uintptr_t counters, uintptr_t stream) const {
        GemvI8Args args = {};
        args.weight = weight_;
        args.x = at<const int8_t>(call.x);
        args.x_low = at<const int8_t>(call.x_low);
        args.x_scale = at<const float>(call.x_scale);
        args.x_sum = at<const int32_t>(call.x_sum);
        args.bias = at<const void>(call.bias);
        args.y = at<void>(call.y);
        args.y_stride = weight_.n;
        args.tokens = call.tokens;
        args.dtype = dtype_of(call.dtype);
        args.blocks = blocks;
        args.sums = at<int64_t>(parts);
        args.counters = at<unsigned>(counters);
        require(gemv_i8(args, at<void>(stream)), "a GEMV");
    }

    void dequantize_to(uintptr_t out, int dtype, uintptr_t stream) const {
        require(dequantize({weight_, at<void>(out), weight_.k, dtype_of(dtype)}, at<void>(stream)), "dequantizing");
    }

    void rows(uintptr_t index, int64_t count, uintptr_t out, int dtype, uintptr_t stream) const {
        const EmbeddingArgs args = {weight_,   at<const int64_t>(index), at<void>(out), count,
                                    weight_.k, dtype_of(dtype)};
        require(embedding(args, at<void>(stream)), "gathering rows");
    }

  private:
    Container weight_;
};

// The transforms of an input of n columns, on the device.
struct Transform {
    int n;
    uintptr_t factors, signs;
    bool rotate;
    uintptr_t hartley, order;
};

void transform(const Transform& t, uintptr_t x, int64_t x_stride, int64_t tokens, int dtype, int output, uintptr_t y,
               uintptr_t low, uintptr_t scale, uintptr_t sum, int64_t stride, uintptr_t workspace, int shared_limit,
               uintptr_t stream) {
    TransformInputArgs args = {};
    args.x = at<const void>(x);
    args.x_stride = x_stride;
    args.tokens = tokens;
    args.n = t.n;
    args.dtype = dtype_of(dtype);
    args.factors = at<const float>(t.factors);
    args.signs = at<const uint8_t>(t.signs);
    args.rotate = t.rotate;
    args.hartley = at<const float>(t.hartley);
    args.order = at<const int32_t>(t.order);
    args.output = static_cast<TransformOutput>(output);
    args.y = at<void>(y);
    args.low = at<int8_t>(low);
    args.scale = at<float>(scale);
    args.sum = at<int32_t>(sum);
    args.stride = stride;
    args.workspace = at<float>(workspace);
    args.shared_limit = static_cast<size_t>(shared_limit);
    require(transform_input(args, at<void>(stream)), "transforming an input");
}

int shared_limit() {
    int bytes = 0;
    require(shared_memory_of_block(&bytes), "asking the device for its shared memory");
    return bytes;
}

} // namespace
} // namespace bitpalette

PYBIND11_MODULE(_cuda, m) {
    using namespace bitpalette;
    // classes are this module's own: the tests load one more, built for the host executor
    m.doc() = "CUDA kernels of bitpalette";
    m.attr("interface_version") = 1;
    py::class_<GemmPlan>(m, "GemmPlan", py::module_local())
        .def_readonly("shape", &GemmPlan::shape)
        .def_readonly("shares", &GemmPlan::shares)
        .def_readonly("stages", &GemmPlan::stages)
        .def_readonly("shared_bytes", &GemmPlan::shared_bytes)
        .def_readonly("part_words", &GemmPlan::part_words)
        .def_readonly("counters", &GemmPlan::counters);
    py::class_<Call>(m, "Call", py::module_local())
        .def(py::init([](uintptr_t x, uintptr_t x_low, uintptr_t x_scale, uintptr_t x_sum, uintptr_t bias, uintptr_t y,
                         int64_t x_stride, int tokens, int x_bytes, int dtype) {
            return Call{x, x_low, x_scale, x_sum, bias, y, x_stride, tokens, x_bytes, dtype};
        }));
    py::class_<PackedWeight>(m, "PackedWeight", py::module_local())
        .def(py::init<int, int64_t, int64_t, int, int, int, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t,
                      uintptr_t>())
        .def("plan", &PackedWeight::plan)
        .def("gemm", &PackedWeight::gemm)
        .def("plan_gemv", &PackedWeight::plan_gemv)
        .def("gemv", &PackedWeight::gemv)
        .def("dequantize", &PackedWeight::dequantize_to)
        .def("rows", &PackedWeight::rows);
    py::class_<Transform>(m, "Transform", py::module_local())
        .def(py::init([](int n, uintptr_t factors, uintptr_t signs, bool rotate, uintptr_t hartley, uintptr_t order) {
            return Transform{n, factors, signs, rotate, hartley, order};
        }));
    m.def("transform_input", &transform);
    m.def("transform_room", [](int n) { return transform_input_room(n); });
    m.def("shared_limit", &shared_limit);
    bind_cuda_kv(m);
}
