// Cuts images into patches, embeds each, and adds the fixed positions (formulas: src/ops/patch_embed/mod.rs).
//
//   x [B, IC, H, W] -> patches [B, T, K], K = IC p p -> W [C, K], b [C] -> + positions [T, C] -> y [B, T, C]
//
// K is small (16 for latents and p = 2), so the product is bound by writing y. Saved for backward: patches.
#include "common.cuh"

constexpr int PART_ROWS = 128;  // tokens whose gradients one thread adds up

// Where element k of a patch (channel, row, column) lies in its image.
__device__ __forceinline__ long long pixel(int row, int k, int IC, int H, int W, int p) {
    int across = W / p, tokens = H / p * across;
    int b = row / tokens, t = row % tokens;
    int channel = k / (p * p), i = k / p % p, j = k % p;
    return (((long long)b * IC + channel) * H + t / across * p + i) * W + t % across * p + j;
}

// Grid: ceil(B T K / 256) blocks of 256 threads.
extern "C" __global__ void __launch_bounds__(256) patch_embed_fwd_cut(
    float* __restrict__ patches,  // [B, T, K]
    const float* __restrict__ x,  // [B, IC, H, W]
    int rows,                     // B T
    int IC,
    int H,
    int W,
    int p
) {
    int K = IC * p * p;
    long long i = (long long)blockIdx.x * 256 + threadIdx.x;
    if (i < (long long)rows * K) patches[i] = x[pixel((int)(i / K), (int)(i % K), IC, H, W, p)];
}

// Grid: ceil(B T C / 256) blocks of 256 threads.
extern "C" __global__ void __launch_bounds__(256) patch_embed_fwd(
    elem* __restrict__ y,                // [B, T, C]
    const float* __restrict__ patches,   // [B, T, K]
    const elem* __restrict__ weight,     // [C, K]
    const float* __restrict__ bias,      // [C]
    const float* __restrict__ positions, // [T, C]
    int B,
    int T,
    int C,
    int K
) {
    long long i = (long long)blockIdx.x * 256 + threadIdx.x;
    if (i >= (long long)B * T * C) return;
    int c = (int)(i % C), row = (int)(i / C);
    float sum = bias[c];
    for (int k = 0; k < K; ++k) sum = fmaf(patches[(long long)row * K + k], to_f32(weight[(long long)c * K + k]), sum);
    from_f32(y[i], sum + positions[(long long)(row % T) * C + c]);
}

// Sums over PART_ROWS tokens: of dy times each element of the patch, and of dy itself (k = K).
// Grid: (ceil((K + 1) C / 256), ceil(B T / PART_ROWS)) blocks of 256 threads.
extern "C" __global__ void __launch_bounds__(256) patch_embed_bwd_parts(
    float* __restrict__ parts,          // [parts, K + 1, C]
    const elem* __restrict__ dy,        // [B, T, C]
    const float* __restrict__ patches,  // [B, T, K]
    int rows,                           // B T
    int C,
    int K
) {
    int i = blockIdx.x * 256 + threadIdx.x;
    if (i >= (K + 1) * C) return;
    int c = i % C, k = i / C;
    int first = blockIdx.y * PART_ROWS, end = min(rows, first + PART_ROWS);
    float sum = 0.0f;
    for (int row = first; row < end; ++row)
        sum = fmaf(to_f32(dy[(long long)row * C + c]), k < K ? patches[(long long)row * K + k] : 1.0f, sum);
    parts[(long long)blockIdx.y * (K + 1) * C + i] = sum;
}

// Grid: ceil((K + 1) C / 256) blocks of 256 threads.
extern "C" __global__ void __launch_bounds__(256) patch_embed_bwd_weight(
    float* __restrict__ dweight,      // [C, K]  = or +=
    float* __restrict__ dbias,        // [C]     = or +=
    const float* __restrict__ parts,  // [count, K + 1, C]
    int count,
    int add,
    int C,
    int K
) {
    int i = blockIdx.x * 256 + threadIdx.x;
    if (i >= (K + 1) * C) return;
    int c = i % C, k = i / C;
    float sum = 0.0f;
    for (int part = 0; part < count; ++part) sum += parts[(long long)part * (K + 1) * C + i];
    float* to = k < K ? dweight + (long long)c * K + k : dbias + c;
    *to = add ? *to + sum : sum;
}

// Gradient of the images, one warp a pixel.  Grid: ceil(B T K / 8) blocks of 256 threads.
extern "C" __global__ void __launch_bounds__(256) patch_embed_bwd_input(
    float* __restrict__ dx,           // [B, IC, H, W]  = or +=
    const elem* __restrict__ dy,      // [B, T, C]
    const elem* __restrict__ weight,  // [C, K]
    int add,
    int rows,                         // B T
    int C,
    int IC,
    int H,
    int W,
    int p
) {
    int K = IC * p * p, lane = threadIdx.x % 32;
    long long i = (long long)blockIdx.x * 8 + threadIdx.x / 32;
    if (i >= (long long)rows * K) return;
    int row = (int)(i / K), k = (int)(i % K);
    float sum = 0.0f;
    for (int c = lane; c < C; c += 32)
        sum = fmaf(to_f32(dy[(long long)row * C + c]), to_f32(weight[(long long)c * K + k]), sum);
    sum = warp_sum(sum);
    long long at = pixel(row, k, IC, H, W, p);
    if (lane == 0) dx[at] = add ? dx[at] + sum : sum;
}
