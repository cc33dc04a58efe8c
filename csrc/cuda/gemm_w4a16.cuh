// Formats of the GEMM with 16-bit activations: m16n8k16, sums in fp32.
#pragma once

#include "fragment_float.cuh"
#include "fragment_int.cuh"
#include "fragment_lut.cuh"
#include "fragment_trellis.cuh"
#include "gemm_body.cuh"

namespace bitpalette {

template <class Fragment>
struct W4A16 {
    using Act = typename Fragment::Act;
    using Table = typename Fragment::Table;
    using Words = typename Fragment::Words;
    using Total = float;
    using Sum = float;
    static constexpr int column_bytes = 2;
    static constexpr int multiplies = 4; // matrix instructions along a superblock
    static constexpr bool scaled = Fragment::grouped;
    static constexpr int first_bytes = scaled ? 2 : 0; // fp16 scales
    static constexpr int table_bytes = Fragment::table_bytes;
    static constexpr int least_bytes = Fragment::least_bytes, most_bytes = Fragment::most_bytes;

    struct Group {
        typename Fragment::Zero zero;
        float scale, scale8; // of rows g and g + 8
    };
    struct Row {
        float scale;
    };

    BP_HOST_DEVICE static int superblock_bytes(const FragmentArgs& args) { return Fragment::superblock_bytes(args); }
    BP_DEVICE static void fill(const FragmentArgs& args, uint8_t* shared, int warps) {
        Fragment::fill(args, shared, warps);
    }
    BP_DEVICE static Table table(const FragmentArgs& args, const uint8_t* shared) {
        return Fragment::table(args, shared);
    }
    BP_DEVICE static Words load(const Table& table, const uint8_t* superblock, int n16, int lane) {
        return Fragment::load(table, superblock, n16, lane);
    }
    BP_DEVICE static Group group(const FragmentArgs& args, const uint8_t* scales, bool has_zeros,
                                 const uint8_t* zeros) {
        if constexpr (scaled) {
            const uint16_t* scale = reinterpret_cast<const uint16_t*>(scales);
            return {Fragment::zero(has_zeros ? zeros[0] : args.default_zero, has_zeros ? zeros[8] : args.default_zero),
                    ptx::f16_to_float(scale[0]), ptx::f16_to_float(scale[8])};
        } else {
            return {};
        }
    }
    BP_DEVICE static void fragment(const Table& table, const Group& group, const Words& words, int k,
                                   uint32_t (&a)[4]) {
        Fragment::fragment(table, group.zero, words, k, a);
    }
    // four columns of a lane's token: its pairs for k slots 2t and 2t + 8
    BP_DEVICE static void load_tokens(const uint8_t* tokens, int k, uint32_t (&b)[2]) {
        const uint2 pair = *reinterpret_cast<const uint2*>(tokens + k * 2 * tile_side);
        b[0] = pair.x;
        b[1] = pair.y;
    }
    BP_DEVICE static void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { Act::mma(c, a, b); }
    BP_DEVICE static float value(float sum) { return sum; }

    BP_DEVICE static Row row(const GemmArgs& args, int row) {
        return {scaled ? Fragment::factor : Fragment::factor * ptx::f16_to_float(args.scale[row])};
    }
    BP_DEVICE static float result(const GemmArgs&, const Row& row, int, float total) { return total * row.scale; }
};

} // namespace bitpalette
