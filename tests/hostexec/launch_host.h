// csrc/cuda/launch.cuh for the executor.
#pragma once

#include "hostexec.h"

#include <tuple>
#include <utility>

namespace bitpalette {

constexpr size_t default_shared_bytes = 48 * 1024;

template <class... Params, class... Args>
int launch(void (*kernel)(Params...), unsigned grid, unsigned block, size_t shared_bytes, void*, Args&&... args) {
    static_assert(sizeof...(Params) == sizeof...(Args), "as many arguments as the kernel has parameters");
    const std::tuple<Params...> values(std::forward<Args>(args)...);
    // every thread gets its own copy of the parameters, as on a GPU
    return hostexec::launch([&] { std::apply(kernel, values); }, grid, block, shared_bytes);
}

inline const char* error_text(int error) {
    return error == 1 ? "invalid argument" : hostexec::error();
}

// of sm_86 and sm_89, the least there is
inline int shared_memory_of_block(int* bytes) {
    *bytes = 99 * 1024;
    return 0;
}

template <class... Params>
int resident_blocks(void (*)(Params...), unsigned, size_t, int* blocks) {
    *blocks = hostexec::resident_blocks();
    return 0;
}

} // namespace bitpalette
