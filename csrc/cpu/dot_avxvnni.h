// The dot product of AVX-VNNI. A test builds the same units with AVX-512's encoding of it, which more machines run.
#pragma once

#include <immintrin.h>

namespace bitpalette {
namespace {

// vpdpbusd: each lane of `sum` adds four products of unsigned bytes of a and signed bytes of b, without saturation.
inline __m256i dot_bytes(__m256i sum, __m256i a, __m256i b) {
#ifdef BITPALETTE_AVXVNNI_IS_AVX512
    return _mm256_dpbusd_epi32(sum, a, b);
#else
    return _mm256_dpbusd_avx_epi32(sum, a, b);
#endif
}

// vpdpwssd: each lane of `sum` adds two products of 16-bit halves.
inline __m256i dot_shorts(__m256i sum, __m256i a, __m256i b) {
#ifdef BITPALETTE_AVXVNNI_IS_AVX512
    return _mm256_dpwssd_epi32(sum, a, b);
#else
    return _mm256_dpwssd_avx_epi32(sum, a, b);
#endif
}

} // namespace
} // namespace bitpalette
