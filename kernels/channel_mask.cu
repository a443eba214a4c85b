// Keeps some channels of the residual stream, for random routing (formulas: src/ops/channel_mask/mod.rs).
//
//   x [B, T, C], mask [B, C] of 0 and 1 -> y = base + factor x      factor = mask, or 1 - mask
//
// Backward is the same kernel: dx = (dx +) factor dy.
#include "common.cuh"

// Grid: ceil(B T C / 256) blocks of 256 threads.
extern "C" __global__ void __launch_bounds__(256) channel_mask_fwd(
    elem* y,                         // [B, T, C]
    const elem* base,                // [B, T, C], or null; may be y
    const elem* __restrict__ x,      // [B, T, C]
    const float* __restrict__ mask,  // [B, C]
    int keep_inactive,               // factor = 1 - mask
    int B,
    int T,
    int C
) {
    long long i = (long long)blockIdx.x * 256 + threadIdx.x;
    if (i >= (long long)B * T * C) return;
    float factor = mask[i / C / T * C + i % C];
    if (keep_inactive) factor = 1.0f - factor;
    float value = factor * to_f32(x[i]);
    from_f32(y[i], base ? to_f32(base[i]) + value : value);
}
