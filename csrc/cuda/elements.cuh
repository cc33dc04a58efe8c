// Values in memory as the types of activations, and in registers as fp32.
#pragma once

#include <cstdint>

#include "../cpu/dtype.h"
#include "ptx.cuh"

namespace bitpalette {

BP_HOST_DEVICE constexpr int element_bytes(Dtype type) {
    return type == Dtype::f32 ? 4 : 2;
}

template <Dtype D>
BP_DEVICE float load_element(const void* from, int64_t i) {
    if constexpr (D == Dtype::f32)
        return static_cast<const float*>(from)[i];
    else if constexpr (D == Dtype::f16)
        return ptx::f16_to_float(static_cast<const uint16_t*>(from)[i]);
    else
        return ptx::bf16_to_float(static_cast<const uint16_t*>(from)[i]);
}

template <Dtype D>
BP_DEVICE void store_element(void* to, int64_t i, float value) {
    if constexpr (D == Dtype::f32)
        static_cast<float*>(to)[i] = value;
    else if constexpr (D == Dtype::f16)
        static_cast<uint16_t*>(to)[i] = ptx::float_to_f16(value);
    else
        static_cast<uint16_t*>(to)[i] = ptx::float_to_bf16(value);
}

// Four neighbours in one store: to + i is aligned to four elements.
template <Dtype D>
BP_DEVICE void store_four(void* to, int64_t i, const float (&v)[4]) {
    if constexpr (D == Dtype::f32)
        *reinterpret_cast<float4*>(static_cast<float*>(to) + i) = {v[0], v[1], v[2], v[3]};
    else if constexpr (D == Dtype::f16)
        *reinterpret_cast<uint2*>(static_cast<uint16_t*>(to) + i) = {ptx::pack_f16x2(v[0], v[1]),
                                                                     ptx::pack_f16x2(v[2], v[3])};
    else
        *reinterpret_cast<uint2*>(static_cast<uint16_t*>(to) + i) = {ptx::pack_bf16x2(v[0], v[1]),
                                                                     ptx::pack_bf16x2(v[2], v[3])};
}

// Whether store_four may be used for all multiples of four of rows `stride` elements apart.
template <Dtype D>
BP_DEVICE bool aligned_to_four(const void* to, int64_t stride) {
    return reinterpret_cast<uintptr_t>(to) % (4 * element_bytes(D)) == 0 && stride % 4 == 0;
}

// The first `n` of four, of which those from n on may lie beyond the buffer; in one store where that is `aligned`.
template <Dtype D>
BP_DEVICE void store_up_to_four(void* to, int64_t i, const float (&v)[4], int n, bool aligned) {
    if (n >= 4 && aligned) {
        store_four<D>(to, i, v);
        return;
    }
    BP_UNROLL
    for (int j = 0; j < 4; ++j)
        if (j < n)
            store_element<D>(to, i + j, v[j]);
}

} // namespace bitpalette
