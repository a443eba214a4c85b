// Cuts images into patches, embeds each, and adds the fixed positions (formulas: src/ops/patch_embed/mod.rs).
//
//   x [B, IC, H, W] -> patches [B, T, K], K = IC p p -> W [C, K], b [C] -> + positions [T, C] -> y [B, T, C]
//
// K is small (16 for latents and p = 2), so the product is bound by writing y. Saved for backward: patches.
#include "vector.cuh"

constexpr int WARPS = 8;
constexpr int LANE_CHANNELS = 4;              // of a lane
constexpr int CHANNELS = 32 * LANE_CHANNELS;  // of a block
constexpr int K_PART = 16;                    // elements of a patch at a time
constexpr int WARP_ROWS = 8;                  // tokens of a warp, forward
constexpr int PART_ROWS = 128;                // tokens of a block, backward

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

// LANE_CHANNELS floats, of which `count` are inside the row.
__device__ __forceinline__ void load_channels(float (&x)[LANE_CHANNELS], const float* from, int count) {
    bool whole = count >= LANE_CHANNELS && is_aligned(from);
    if (whole) {
        load_floats(x, from, true);
    } else {
#pragma unroll
        for (int e = 0; e < LANE_CHANNELS; ++e) x[e] = e < count ? from[e] : 0.0f;
    }
}

__device__ __forceinline__ void load_channels(float (&x)[LANE_CHANNELS], const bf16* from, int count) {
    if (count >= LANE_CHANNELS && ((unsigned long long)from & 7) == 0) {
        uint2 words = *(const uint2*)from;
        x[0] = low_bf16(words.x), x[1] = high_bf16(words.x), x[2] = low_bf16(words.y), x[3] = high_bf16(words.y);
    } else {
#pragma unroll
        for (int e = 0; e < LANE_CHANNELS; ++e) x[e] = e < count ? to_f32(from[e]) : 0.0f;
    }
}

__device__ __forceinline__ void store_channels(float* to, const float (&x)[LANE_CHANNELS], int count) {
    if (count >= LANE_CHANNELS && is_aligned(to)) {
        store_floats(to, x, true);
    } else {
#pragma unroll
        for (int e = 0; e < LANE_CHANNELS; ++e)
            if (e < count) to[e] = x[e];
    }
}

__device__ __forceinline__ void store_channels(bf16* to, const float (&x)[LANE_CHANNELS], int count) {
    if (count >= LANE_CHANNELS && ((unsigned long long)to & 7) == 0) {
        *(uint2*)to = make_uint2(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]));
    } else {
#pragma unroll
        for (int e = 0; e < LANE_CHANNELS; ++e)
            if (e < count) from_f32(to[e], x[e]);
    }
}

// Where channel c of row k of a tile lies: four channels stay together, and few threads that write a column meet in a bank.
__device__ __forceinline__ int turned(int k, int c) { return c ^ k / 2 * 4; }

// K_PART elements of a patch from k on, 0 beyond its end.
__device__ __forceinline__ void load_patch(float (&x)[K_PART], const float* patches, long long row, int k, int K) {
    const float* from = patches + row * K + k;
    if (K % 4 == 0 && k + K_PART <= K) {
        load_floats(x, from, true);
    } else {
#pragma unroll
        for (int e = 0; e < K_PART; ++e) x[e] = k + e < K ? from[e] : 0.0f;
    }
}

// Grid: (ceil(C / CHANNELS), ceil(B T / (WARPS WARP_ROWS))) blocks of 32 WARPS threads.
extern "C" __global__ void __launch_bounds__(32 * WARPS) patch_embed_fwd(
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
    __shared__ __align__(16) float weights[K_PART][CHANNELS];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int c0 = blockIdx.x * CHANNELS, c = c0 + lane * LANE_CHANNELS;
    int first = (blockIdx.y * WARPS + warp) * WARP_ROWS;
    float sums[WARP_ROWS][LANE_CHANNELS];
#pragma unroll
    for (int r = 0; r < WARP_ROWS; ++r)
#pragma unroll
        for (int e = 0; e < LANE_CHANNELS; ++e) sums[r][e] = 0.0f;
    for (int k0 = 0; k0 < K; k0 += K_PART) {
        __syncthreads();
        // Threads one after the other read a row, and write a column of shared memory.
        for (int i = threadIdx.x; i < K_PART * CHANNELS; i += 32 * WARPS) {
            int k = i % K_PART, channel = i / K_PART;
            bool inside = k0 + k < K && c0 + channel < C;
            weights[k][turned(k, channel)] = inside ? to_f32(weight[(long long)(c0 + channel) * K + k0 + k]) : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < K_PART; k += 4) {
            float of_lane[4][LANE_CHANNELS];
#pragma unroll
            for (int j = 0; j < 4; ++j) load_floats(of_lane[j], &weights[k + j][turned(k + j, lane * LANE_CHANNELS)], true);
#pragma unroll
            for (int r = 0; r < WARP_ROWS; ++r) {
                int row = min(first + r, B * T - 1);
                const float* from = patches + (long long)row * K + k0 + k;
                float patch[4];
                if (K % 4 == 0) {
                    if (k0 + k >= K) continue;
                    load_floats(patch, from, true);
                } else {
#pragma unroll
                    for (int j = 0; j < 4; ++j) patch[j] = k0 + k + j < K ? from[j] : 0.0f;
                }
#pragma unroll
                for (int j = 0; j < 4; ++j)
#pragma unroll
                    for (int e = 0; e < LANE_CHANNELS; ++e) sums[r][e] = fmaf(patch[j], of_lane[j][e], sums[r][e]);
            }
        }
    }
    int count = C - c;
    if (count <= 0) return;
    float of_bias[LANE_CHANNELS];
    load_channels(of_bias, bias + c, count);
#pragma unroll
    for (int r = 0; r < WARP_ROWS; ++r) {
        int row = first + r;
        if (row >= B * T) continue;
        float position[LANE_CHANNELS];
        load_channels(position, positions + (long long)(row % T) * C + c, count);
#pragma unroll
        for (int e = 0; e < LANE_CHANNELS; ++e) sums[r][e] += of_bias[e] + position[e];
        store_channels(y + (long long)row * C + c, sums[r], count);
    }
}

// Sums over PART_ROWS tokens: of dy times K_PART elements of the patch, and (part 0 of K) of dy itself.
// Grid: (ceil(C / CHANNELS), ceil(B T / PART_ROWS), ceil(K / K_PART)) blocks of 32 WARPS threads.
extern "C" __global__ void __launch_bounds__(32 * WARPS) patch_embed_bwd_parts(
    float* __restrict__ parts,          // [parts, C K + C]: as dW and db
    const elem* __restrict__ dy,        // [B, T, C]
    const float* __restrict__ patches,  // [B, T, K]
    int rows,                           // B T
    int C,
    int K
) {
    // One row of channels more for dy itself.
    __shared__ __align__(16) float shared[K_PART + 1][CHANNELS];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int c0 = blockIdx.x * CHANNELS, c = c0 + lane * LANE_CHANNELS, k0 = blockIdx.z * K_PART;
    int end = min(rows, ((int)blockIdx.y + 1) * PART_ROWS);
    float sums[K_PART + 1][LANE_CHANNELS];
#pragma unroll
    for (int k = 0; k <= K_PART; ++k)
#pragma unroll
        for (int e = 0; e < LANE_CHANNELS; ++e) sums[k][e] = 0.0f;
    if (c < C)
#pragma unroll 2
        for (int row = blockIdx.y * PART_ROWS + warp; row < end; row += WARPS) {
            float upstream[LANE_CHANNELS], patch[K_PART];
            load_channels(upstream, dy + (long long)row * C + c, C - c);
            load_patch(patch, patches, row, k0, K);
#pragma unroll
            for (int e = 0; e < LANE_CHANNELS; ++e) {
#pragma unroll
                for (int k = 0; k < K_PART; ++k) sums[k][e] = fmaf(upstream[e], patch[k], sums[k][e]);
                sums[K_PART][e] += upstream[e];
            }
        }
    // One warp after the other adds its sums.
    for (int turn = 0; turn < WARPS; ++turn) {
        __syncthreads();
        if (warp != turn) continue;
#pragma unroll
        for (int k = 0; k <= K_PART; ++k) {
            float* own = &shared[k][turned(k, lane * LANE_CHANNELS)];
            if (turn > 0) {
                float before[LANE_CHANNELS];
                load_floats(before, own, true);
#pragma unroll
                for (int e = 0; e < LANE_CHANNELS; ++e) sums[k][e] += before[e];
            }
            store_floats(own, sums[k], true);
        }
    }
    __syncthreads();
    float* own = parts + (long long)blockIdx.y * (K + 1) * C;
    for (int i = threadIdx.x; i < K_PART * CHANNELS; i += 32 * WARPS) {
        int k = i % K_PART, channel = i / K_PART;
        if (k0 + k < K && c0 + channel < C) own[(long long)(c0 + channel) * K + k0 + k] = shared[k][turned(k, channel)];
    }
    int channel = threadIdx.x;
    if (blockIdx.z == 0 && channel < CHANNELS && c0 + channel < C)
        own[(long long)C * K + c0 + channel] = shared[K_PART][turned(K_PART, channel)];
}

// Grid: ceil((K + 1) C / 256) blocks of 256 threads.
extern "C" __global__ void __launch_bounds__(256) patch_embed_bwd_weight(
    float* __restrict__ dweight,      // [C, K]  = or +=
    float* __restrict__ dbias,        // [C]     = or +=
    const float* __restrict__ parts,  // [count, C K + C]
    int count,
    int add,
    int C,
    int K
) {
    int i = blockIdx.x * 256 + threadIdx.x;
    if (i >= (K + 1) * C) return;
    float sum = 0.0f;
    for (int part = 0; part < count; ++part) sum += parts[(long long)part * (K + 1) * C + i];
    float* to = i < K * C ? dweight + i : dbias + (i - K * C);
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
