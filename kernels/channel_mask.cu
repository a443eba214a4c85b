// Keeps some channels of the residual stream, for random routing (formulas: src/ops/channel_mask/mod.rs).
//
//   x [B, T, C], mask [B, C] of 0 and 1 -> y = base + factor x      factor = mask, or 1 - mask
//
// Backward is the same kernel: dx = (dx +) factor dy.
#include "vector.cuh"

constexpr int THREADS = 128;

// Grid: B T blocks of THREADS, one a row.
extern "C" __global__ void __launch_bounds__(THREADS) channel_mask_fwd(
    elem* y,                         // [B, T, C]
    const elem* base,                // [B, T, C], or null; may be y
    const elem* __restrict__ x,      // [B, T, C]
    const float* __restrict__ mask,  // [B, C]
    int keep_inactive,               // factor = 1 - mask
    int T,
    int C
) {
    long long row = (long long)blockIdx.x * C;
    const float* own_mask = mask + (long long)(blockIdx.x / T) * C;
    by_width(C % WIDTH == 0, [&](auto vector) {
        constexpr int COUNT = decltype(vector)::COUNT;
        for (int c = threadIdx.x * COUNT; c < C; c += THREADS * COUNT) {
            float values[COUNT], factors[COUNT], before[COUNT];
            load_floats(factors, own_mask + c, true);
            vector.load(x + row + c);
            vector.unpack(values);
            if (base) {
                vector.load(base + row + c);
                vector.unpack(before);
            }
#pragma unroll
            for (int e = 0; e < COUNT; ++e) {
                values[e] *= keep_inactive ? 1.0f - factors[e] : factors[e];
                if (base) values[e] += before[e];
            }
            vector.pack(values);
            vector.store(y + row + c);
        }
    });
}
