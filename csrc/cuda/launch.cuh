// How a launcher starts its kernel. `int name(const NameArgs&, void* stream)` in namespace bitpalette checks what it
// was given, then returns launch(..): 0 or a cudaError_t. It allocates nothing and waits for nothing, so that it can be
// captured in a CUDA graph.
#pragma once

#include "ptx.cuh"

#ifdef BITPALETTE_HOST_EXECUTOR

#include "launch_host.h"

#else

#include <cuda_runtime_api.h>
#include <tuple>
#include <utility>

namespace bitpalette {

// More than this much dynamic shared memory has to be asked for, kernel by kernel.
constexpr size_t default_shared_bytes = 48 * 1024;

// On the current device; the attribute is the device's, so there is no remembering it. Under a microsecond.
template <class... Params>
int allow_shared(void (*kernel)(Params...), size_t shared_bytes) {
    if (shared_bytes <= default_shared_bytes)
        return cudaSuccess;
    return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(shared_bytes));
}

namespace detail {
template <class Values, size_t... I>
int launch_values(const void* kernel, unsigned grid, unsigned block, size_t shared_bytes, void* stream, Values& values,
                  std::index_sequence<I...>) {
    void* pointers[] = {static_cast<void*>(&std::get<I>(values))..., nullptr};
    return cudaLaunchKernel(kernel, dim3(grid), dim3(block), pointers, shared_bytes, static_cast<cudaStream_t>(stream));
}
} // namespace detail

// kernel(args...) on `grid` blocks of `block` threads with that much dynamic shared memory. 0 or a cudaError_t.
template <class... Params, class... Args>
int launch(void (*kernel)(Params...), unsigned grid, unsigned block, size_t shared_bytes, void* stream,
           Args&&... args) {
    static_assert(sizeof...(Params) == sizeof...(Args), "as many arguments as the kernel has parameters");
    if (const int error = allow_shared(kernel, shared_bytes))
        return error;
    std::tuple<Params...> values(std::forward<Args>(args)...); // converted to what the kernel takes
    return detail::launch_values(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, stream, values,
                                 std::index_sequence_for<Params...>());
}

// What a launcher returned, in words.
inline const char* error_text(int error) {
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}

// The most shared memory that a block may have on the current device. 0 or a cudaError_t.
inline int shared_memory_of_block(int* bytes) {
    int device = 0;
    if (const int error = cudaGetDevice(&device))
        return error;
    return cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

// How many blocks of that kernel the current device holds at once: the grid of a persistent kernel. 0 or a
// cudaError_t. Microseconds, so for a plan, not for every call.
template <class... Params>
int resident_blocks(void (*kernel)(Params...), unsigned block, size_t shared_bytes, int* blocks) {
    int device = 0, multiprocessors = 0, each = 0;
    if (const int error = allow_shared(kernel, shared_bytes))
        return error;
    if (const int error = cudaGetDevice(&device))
        return error;
    if (const int error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device))
        return error;
    if (const int error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, reinterpret_cast<const void*>(kernel),
                                                                        static_cast<int>(block), shared_bytes))
        return error;
    *blocks = each * multiprocessors;
    return cudaSuccess;
}

} // namespace bitpalette

#endif
