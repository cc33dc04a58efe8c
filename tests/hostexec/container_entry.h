// Arguments from Python: launchers as C functions of integers and addresses, and what they refuse as a text.
#pragma once

#include <cstdio>
#include <stdexcept>

#include "container.cuh"

namespace bitpalette {

inline char refusal[512] = "";

// What the launcher returns, or -1 with its message in `refusal`.
template <class Args>
int call_launcher(int (*launcher)(const Args&, void*), const Args& args) {
    try {
        return launcher(args, nullptr);
    } catch (const std::invalid_argument& error) {
        std::snprintf(refusal, sizeof refusal, "%s", error.what());
        return -1;
    }
}

} // namespace bitpalette

// What was refused last, NUL-terminated. One entry file to a library, so this is defined once.
extern "C" int refused(char* to, size_t room) {
    std::snprintf(to, room, "%s", bitpalette::refusal);
    return 0;
}

// The weight as the first arguments of a function: tensors of kernels/tiles.py, then numbers.
#define CONTAINER_PARAMETERS                                                                                           \
    int format, const uint32_t *codes, const uint16_t *scale, const uint8_t *zero_point, const uint16_t *table,        \
        const uint8_t *group_scale, const uint8_t *group_offset, int64_t n, int64_t k, int group_size, int row_bits,   \
        int window
#define CONTAINER                                                                                                      \
    bitpalette::Container {                                                                                            \
        static_cast<bitpalette::Format>(format), codes, scale, zero_point, table, group_scale, group_offset, n, k,     \
            group_size, row_bits, window                                                                               \
    }
