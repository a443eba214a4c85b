// Puts the patches of the final layer back together (formulas: src/ops/unpatchify/mod.rs).
//
//   x [B, T, p p OC] (row, column, channel inside a patch) -> y [B, OC, H, W]
#include "vector.cuh"

// The channels of one pixel: one after the other in x, H W apart in y.
struct Pixel {
    long long in_patches;
    long long in_images;

    __device__ Pixel(unsigned int i, int OC, int H, int W, int p) {
        unsigned int column = i % W, row = i / W % H, b = i / W / H;
        long long token = ((long long)b * (H / p) + row / p) * (W / p) + column / p;
        in_patches = ((token * p + row % p) * p + column % p) * OC;
        in_images = ((long long)b * OC * H + row) * W + column;
    }
};

// One thread a pixel.  Grid: ceil(pixels / 256) blocks of 256 threads.
extern "C" __global__ void __launch_bounds__(256) unpatchify_fwd(
    float* __restrict__ y,       // [B, OC, H, W]
    const elem* __restrict__ x,  // [B, T, p p OC]
    int OC,
    int H,
    int W,
    int p,
    unsigned int pixels  // B H W
) {
    unsigned int i = blockIdx.x * 256 + threadIdx.x;
    if (i >= pixels) return;
    Pixel pixel(i, OC, H, W, p);
    by_width(OC % WIDTH == 0, [&](auto vector) {
        constexpr int COUNT = decltype(vector)::COUNT;
        for (int channel = 0; channel < OC; channel += COUNT) {
            float values[COUNT];
            vector.load(x + pixel.in_patches + channel);
            vector.unpack(values);
#pragma unroll
            for (int e = 0; e < COUNT; ++e) y[pixel.in_images + (long long)(channel + e) * H * W] = values[e];
        }
    });
}

// Grid: as the forward pass.
extern "C" __global__ void __launch_bounds__(256) unpatchify_bwd(
    elem* __restrict__ dx,         // [B, T, p p OC]
    const float* __restrict__ dy,  // [B, OC, H, W]
    int OC,
    int H,
    int W,
    int p,
    unsigned int pixels
) {
    unsigned int i = blockIdx.x * 256 + threadIdx.x;
    if (i >= pixels) return;
    Pixel pixel(i, OC, H, W, p);
    by_width(OC % WIDTH == 0, [&](auto vector) {
        constexpr int COUNT = decltype(vector)::COUNT;
        for (int channel = 0; channel < OC; channel += COUNT) {
            float values[COUNT];
#pragma unroll
            for (int e = 0; e < COUNT; ++e) values[e] = dy[pixel.in_images + (long long)(channel + e) * H * W];
            vector.pack(values);
            vector.store(dx + pixel.in_patches + channel);
        }
    });
}
