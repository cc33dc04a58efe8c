// How the work of a GEMM is split: stream-K (Osama et al., arXiv 2301.03598) with sums in a fixed order.
//
// An output tile takes `steps` steps along K. All steps of all tiles, one tile after another, are cut into equal
// shares, one for each block of threads. A block whose share begins or ends inside a tile stores its sums; the block
// that comes last to a tile adds up all of them, in the order of K, whoever it is. So the result does not depend on who
// was when, nobody waits for anybody, and the counters are zero again at the end.
#pragma once

#include "ptx.cuh"

namespace bitpalette {

struct StreamK {
    int tiles, steps; // steps of one tile
    int shares;       // blocks
    bool whole;       // tiles are not split: what a tile's sums are does not depend on the other tiles

    // The products below fit in 31 bits.
    BP_HOST_DEVICE bool fits() const { return int64_t(tiles) * steps * (shares + 1) < int64_t(1) << 31; }

    // First step, of all tiles', of a share; that of share `shares` is the end.
    BP_HOST_DEVICE int begin(int share) const {
        return whole ? share * tiles / shares * steps : share * (tiles * steps) / shares;
    }
    // The share that a step is in.
    BP_HOST_DEVICE int owner(int step) const {
        const int all = whole ? tiles : tiles * steps, at = whole ? step / steps : step;
        return ((at + 1) * shares - 1) / all;
    }
};

// Where the sums of a share that has a part of a tile are kept: a share has at most two such parts, the end of one tile
// and the beginning of another.
BP_HOST_DEVICE int part_slot(const StreamK& work, int share, int tile) {
    return 2 * share + (work.begin(share) <= tile * work.steps ? 1 : 0);
}

} // namespace bitpalette
