#include "demo.cuh"
#include "launch.cuh"

namespace bitpalette {

int demo(const uint16_t* w, const uint16_t* x, float* y, int n, int k, void* stream) {
    return launch(demo_kernel<0>, static_cast<unsigned>((n + demo_rows - 1) / demo_rows), 32 * demo_warps,
                  demo_stages * demo_stage_bytes, stream, w, x, y, n, k);
}

} // namespace bitpalette

extern "C" int run_demo(const uint16_t* w, const uint16_t* x, float* y, int n, int k) {
    return bitpalette::demo(w, x, y, n, k, nullptr);
}
