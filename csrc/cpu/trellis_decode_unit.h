// What each instruction set's translation unit of trellis_decode provides.
#pragma once

#include "trellis_decode.h"

namespace bitpalette {

struct TrellisDecodeUnit {
    // rows index[begin..end-1] (null: begin..end-1 themselves) of W to y + i * in
    void (*rows)(const TrellisWeight& w, const int64_t* index, int64_t begin, int64_t end, float* y);
    // y [tokens, out], columns begin..end-1 only; row: room for a row [in]
    void (*linear)(const TrellisWeight& w, const float* x, int64_t tokens, float* y, int64_t begin, int64_t end,
                   float* row);
};

extern const TrellisDecodeUnit trellis_decode_scalar;
#if BITPALETTE_X86
extern const TrellisDecodeUnit trellis_decode_avx2;
extern const TrellisDecodeUnit trellis_decode_avx512;
#endif

} // namespace bitpalette
