// Linear layers of few rows (the timestep network, the modulation of all blocks): memory-bound, so each weight is read once
// for ROWS samples. Rows and their gradients are f32, weights elem.
//
//   y = x W^T + b        x [B, K], W [N, K], b [N], y [B, N]
//   dx = dy W,  dW = dy^T x,  db = sum_b dy
#pragma once

#include "common.cuh"

constexpr int ROWS = 8;          // samples at a time
constexpr int ROW_THREADS = 256;
constexpr int K_LANES = 64;      // inputs of a block of dx

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

__device__ __forceinline__ float silu_derivative(float x) {
    float s = 1.0f / (1.0f + expf(-x));
    return s * fmaf(x, 1.0f - s, 1.0f);
}

// One warp an output.  Grid: (ceil(N / 8), ceil(B / ROWS)) blocks of ROW_THREADS.
__device__ __forceinline__ void rows_forward(
    float* y, const float* x, const elem* weight, const float* bias, int B, int K, int N
) {
    int n = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.y * ROWS;
    if (n >= N) return;
    float sums[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) sums[r] = 0.0f;
#pragma unroll 2
    for (int k = lane; k < K; k += 32) {
        float w = to_f32(weight[(long long)n * K + k]);
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
            if (first + r < B) sums[r] = fmaf(x[(long long)(first + r) * K + k], w, sums[r]);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        float sum = warp_sum(sums[r]);
        if (lane == 0 && first + r < B) y[(long long)(first + r) * N + n] = sum + bias[n];
    }
}

// The part of dx that outputs `blockIdx.z` of `splits` give.  Grid: (ceil(K / K_LANES), ceil(B / ROWS), splits).
__device__ __forceinline__ void rows_backward_input(
    float* parts, const float* dy, const elem* weight, int B, int K, int N
) {
    __shared__ float shared[ROW_THREADS / K_LANES][ROWS][K_LANES];
    int k = blockIdx.x * K_LANES + threadIdx.x % K_LANES, lane = threadIdx.x / K_LANES, first = blockIdx.y * ROWS;
    int each = (N + gridDim.z - 1) / gridDim.z, end = min(N, ((int)blockIdx.z + 1) * each);
    float sums[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) sums[r] = 0.0f;
    if (k < K)
        for (int n = blockIdx.z * each + lane; n < end; n += ROW_THREADS / K_LANES) {
            float w = to_f32(weight[(long long)n * K + k]);
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
                if (first + r < B) sums[r] = fmaf(dy[(long long)(first + r) * N + n], w, sums[r]);
        }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) shared[lane][r][threadIdx.x % K_LANES] = sums[r];
    __syncthreads();
    if (lane > 0 || k >= K) return;
    for (int r = 0; r < ROWS && first + r < B; ++r) {
        float sum = 0.0f;
        for (int l = 0; l < ROW_THREADS / K_LANES; ++l) sum += shared[l][r][threadIdx.x];
        parts[((long long)blockIdx.z * B + first + r) * K + k] = sum;
    }
}

// One thread a weight.  Grid: ceil(N K / ROW_THREADS).
__device__ __forceinline__ void rows_backward_weight(
    float* dweight, float* dbias, const float* dy, const float* x, int add, int B, int K, int N
) {
    long long index = (long long)blockIdx.x * ROW_THREADS + threadIdx.x;
    if (index >= (long long)N * K) return;
    int n = (int)(index / K), k = (int)(index % K);
    float sum = 0.0f, bias_sum = 0.0f;
    for (int b = 0; b < B; ++b) {
        float upstream = dy[(long long)b * N + n];
        sum = fmaf(upstream, x[(long long)b * K + k], sum);
        bias_sum += upstream;
    }
    dweight[index] = add ? dweight[index] + sum : sum;
    if (k == 0) dbias[n] = add ? dbias[n] + bias_sum : bias_sum;
}

// dx = silu'(x) times the sum of the parts of dx, or without SiLU.  Grid: ceil(B K / ROW_THREADS).
__device__ __forceinline__ void rows_sum_parts(
    float* dx, const float* parts, const float* before_silu, int splits, int add, unsigned int n
) {
    unsigned int i = blockIdx.x * ROW_THREADS + threadIdx.x;
    if (i >= n) return;
    float sum = 0.0f;
    for (int s = 0; s < splits; ++s) sum += parts[(unsigned long long)s * n + i];
    if (before_silu) sum *= silu_derivative(before_silu[i]);
    dx[i] = add ? dx[i] + sum : sum;
}
