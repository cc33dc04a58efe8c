// The body of bandwidth_*.cpp: loads and exclusive ors, nothing else. Everything is in an unnamed namespace: a function
// shared by name between units would be linked once, with one unit's instructions.
#pragma once

#include <cstring>

#include "bandwidth.h"

namespace bitpalette {
namespace {

// Read side by side. One stream leaves the hardware prefetchers of a server core short of requests in flight: four read
// 16.5 GB/s where one reads 15.0 (Xeon of the Sapphire Rapids class, 64 MiB at a time, one thread); 8 and 16 add
// nothing, nor does prefetching by software.
constexpr int streams = 4;
constexpr int64_t line = 64;

// V::Reg: the widest register of the instruction set, as a vector of uint64_t.
template <class V>
uint64_t read_all(const uint8_t* from, int64_t bytes) {
    using Reg = typename V::Reg;
    constexpr int64_t width = sizeof(Reg), registers = line / width;
    const int64_t part = bytes / streams / line * line;
    Reg sums[streams][registers] = {};
    for (int64_t i = 0; i < part; i += line)
        for (int s = 0; s < streams; ++s)
            for (int64_t r = 0; r < registers; ++r) {
                Reg loaded;
                std::memcpy(&loaded, from + s * part + i + r * width, width);
                sums[s][r] ^= loaded;
            }
    uint64_t words[streams * line / 8];
    std::memcpy(words, sums, sizeof words);
    uint64_t total = 0;
    for (const uint64_t word : words)
        total ^= word;
    for (int64_t i = streams * part; i + 8 <= bytes; i += 8) {
        uint64_t word;
        std::memcpy(&word, from + i, 8);
        total ^= word;
    }
    return total;
}

} // namespace
} // namespace bitpalette
