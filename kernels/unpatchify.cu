// Puts the patches of the final layer back together (formulas: src/ops/unpatchify/mod.rs).
//
//   x [B, T, p p OC] (row, column, channel inside a patch) -> y [B, OC, H, W]
#include "common.cuh"

// Where element i of the images comes from in the patches.
__device__ __forceinline__ long long in_patches(long long i, int OC, int H, int W, int p) {
    int column = (int)(i % W), row = (int)(i / W % H), channel = (int)(i / W / H % OC);
    long long b = i / W / H / OC;
    long long token = (b * (H / p) + row / p) * (W / p) + column / p;
    return ((token * p + row % p) * p + column % p) * OC + channel;
}

// Grid: ceil(n / 256) blocks of 256 threads.
extern "C" __global__ void __launch_bounds__(256) unpatchify_fwd(
    float* __restrict__ y,       // [B, OC, H, W]
    const elem* __restrict__ x,  // [B, T, p p OC]
    int OC,
    int H,
    int W,
    int p,
    unsigned long long n  // B OC H W
) {
    unsigned long long i = (unsigned long long)blockIdx.x * 256 + threadIdx.x;
    if (i < n) y[i] = to_f32(x[in_patches(i, OC, H, W, p)]);
}

// Grid: as the forward pass.
extern "C" __global__ void __launch_bounds__(256) unpatchify_bwd(
    elem* __restrict__ dx,         // [B, T, p p OC]
    const float* __restrict__ dy,  // [B, OC, H, W]
    int OC,
    int H,
    int W,
    int p,
    unsigned long long n
) {
    unsigned long long i = (unsigned long long)blockIdx.x * 256 + threadIdx.x;
    if (i < n) from_f32(dx[in_patches(i, OC, H, W, p)], dy[i]);
}
