// What a warp's collective does, as the PTX manual says (ISA 9.0, 9.7.13 to 9.7.15). mma: products exact, sums fp32 in
// the order of k. Hardware adds in an order and with a truncation of its own, so results of 16-bit mma are compared
// with a tolerance, never to the bit; those of int8 are exact.
#include "core.h"
#include "small_float.h"

namespace hostexec {
namespace {

using Slots = std::array<Warp::Slot, 32>;

float half_value(uint32_t bits) {
    // the exponent moved by a product, which also normalizes denormal numbers
    const float value = bits_of<float>((bits & 0x7fff) << 13) * 0x1p112f;
    const uint32_t special = (bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
    return bits_of<float>(bits_of<uint32_t>(value) | special | (bits & 0x8000) << 16);
}
float bfloat_value(uint32_t bits) {
    return bits_of<float>(bits << 16);
}

template <class Value>
void mma_16bit(Slots& slots, Value value) {
    float a[16][16], b[16][8], c[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        const auto& in = slots[lane].in;
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 2; ++j)
                a[g + 8 * (i & 1)][2 * t + 8 * (i >> 1) + j] = value(in[i] >> 16 * j & 0xffff);
        for (int i = 0; i < 2; ++i)
            for (int j = 0; j < 2; ++j)
                b[2 * t + 8 * i + j][g] = value(in[4 + i] >> 16 * j & 0xffff);
        for (int i = 0; i < 4; ++i)
            c[g + 8 * (i >> 1)][2 * t + (i & 1)] = bits_of<float>(in[6 + i]);
    }
    for (int m = 0; m < 16; ++m)
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < 8; ++n)
                c[m][n] += a[m][k] * b[k][n];
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i)
            slots[lane].out[i] = bits_of<uint32_t>(c[lane / 4 + 8 * (i >> 1)][2 * (lane % 4) + (i & 1)]);
}

void mma_8bit(Slots& slots) {
    int32_t a[16][32], b[32][8];
    uint32_t c[16][8]; // unsigned: it wraps around
    const auto byte = [](uint32_t word, int i) { return static_cast<int32_t>(static_cast<int8_t>(word >> 8 * i)); };
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        const auto& in = slots[lane].in;
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 4; ++j)
                a[g + 8 * (i & 1)][4 * t + 16 * (i >> 1) + j] = byte(in[i], j);
        for (int i = 0; i < 2; ++i)
            for (int j = 0; j < 4; ++j)
                b[4 * t + 16 * i + j][g] = byte(in[4 + i], j);
        for (int i = 0; i < 4; ++i)
            c[g + 8 * (i >> 1)][2 * t + (i & 1)] = in[6 + i];
    }
    for (int m = 0; m < 16; ++m)
        for (int k = 0; k < 32; ++k)
            for (int n = 0; n < 8; ++n)
                c[m][n] += static_cast<uint32_t>(a[m][k] * b[k][n]);
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i)
            slots[lane].out[i] = c[lane / 4 + 8 * (i >> 1)][2 * (lane % 4) + (i & 1)];
}

// in[0 .. 4): the 16 bytes of the lane's row
void ldmatrix(Slots& slots) {
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i)
            slots[lane].out[i] = slots[8 * i + lane / 4].in[lane % 4];
}

// in[0]: (g; 2t, 2t+1) of the 8x8 matrix; out[0]: (2t, 2t+1; g)
void transpose(Slots& slots) {
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        uint32_t pair = 0;
        for (int j = 0; j < 2; ++j) // row 2t + j, column g
            pair |= (slots[4 * (2 * t + j) + g / 2].in[0] >> 16 * (g % 2) & 0xffff) << 16 * j;
        slots[lane].out[0] = pair;
    }
}

template <class From>
void exchange(Slots& slots, From from) {
    for (int lane = 0; lane < 32; ++lane) {
        const int other = from(lane, static_cast<int>(slots[lane].in[1]));
        slots[lane].out[0] = slots[other < 0 || other > 31 ? lane : other].in[0];
    }
}

template <class Join>
void reduce(Slots& slots, Join join) {
    uint32_t all = slots[0].in[0];
    for (int lane = 1; lane < 32; ++lane)
        all = join(all, slots[lane].in[0]);
    for (auto& slot : slots)
        slot.out[0] = all;
}

} // namespace

const char* name(Op op) {
    static constexpr const char* names[] = {"sync_warp", "shfl",      "shfl_down", "shfl_xor",    "ballot",
                                            "redux_add", "redux_max", "redux_min", "ldmatrix_x4", "movmatrix",
                                            "mma_f16",   "mma_bf16",  "mma_s8"};
    return names[static_cast<int>(op)];
}

void execute(Op op, Slots& slots) {
    switch (op) {
    case Op::sync_warp:
        break;
    case Op::shfl:
        exchange(slots, [](int, int from) { return from & 31; });
        break;
    case Op::shfl_down:
        exchange(slots, [](int lane, int delta) { return lane + (delta & 31); });
        break;
    case Op::shfl_xor:
        exchange(slots, [](int lane, int mask) { return lane ^ (mask & 31); });
        break;
    case Op::ballot: {
        uint32_t bits = 0;
        for (int lane = 0; lane < 32; ++lane)
            bits |= (slots[lane].in[0] & 1) << lane;
        for (auto& slot : slots)
            slot.out[0] = bits;
        break;
    }
    case Op::redux_add:
        reduce(slots, [](uint32_t a, uint32_t b) { return a + b; });
        break;
    case Op::redux_max:
        reduce(slots, [](uint32_t a, uint32_t b) { return a < b ? b : a; });
        break;
    case Op::redux_min:
        reduce(slots, [](uint32_t a, uint32_t b) { return a < b ? a : b; });
        break;
    case Op::ldmatrix_x4:
        ldmatrix(slots);
        break;
    case Op::movmatrix:
        transpose(slots);
        break;
    case Op::mma_f16:
        mma_16bit(slots, half_value);
        break;
    case Op::mma_bf16:
        mma_16bit(slots, bfloat_value);
        break;
    case Op::mma_s8:
        mma_8bit(slots);
        break;
    }
}

} // namespace hostexec
