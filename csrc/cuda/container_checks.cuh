// What launchers check of a packed weight before they give it to a kernel.
#pragma once

#include <stdexcept>
#include <string>

#include "container.cuh"

namespace bitpalette {

// std::invalid_argument where the sizes are none that kernels/tiles.py makes.
inline void check_container(const Container& w) {
    const auto refuse = [](const std::string& what) { throw std::invalid_argument(what); };
    if (w.n < 1 || w.k < 1 || w.n > 1 << 30 || w.k > 1 << 30)
        refuse("a weight of " + std::to_string(w.n) + " x " + std::to_string(w.k) + "; 1 to 2^30 rows and columns");
    if (w.group_size != 0 && w.group_size != 32 && (w.group_size < 0 || w.group_size % superblock != 0))
        refuse("groups of " + std::to_string(w.group_size) + " columns; 0 (all), 32 or a multiple of 64");
    if (w.codes == nullptr || w.scale == nullptr)
        refuse("a weight without codes or scale");
    const bool lut = w.format == Format::lut2 || w.format == Format::lut3 || w.format == Format::lut4;
    if (lut && w.table == nullptr)
        refuse("a lut weight without its table");
    if (w.format == Format::progressive && (w.group_scale == nullptr || w.group_offset == nullptr))
        refuse("a progressive weight without group_scale or group_offset");
    if (w.format != Format::trellis)
        return;
    if (w.row_bits < 16 || w.row_bits > 80 || (w.window != 12 && w.window != 14 && w.window != 16))
        refuse("a trellis of " + std::to_string(w.row_bits) + " bits in 16 weights, window " +
               std::to_string(w.window) + "; 16 to 80 bits, windows of 12, 14 or 16");
}

} // namespace bitpalette
