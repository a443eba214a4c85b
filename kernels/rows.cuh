// Linear layers of few rows (the timestep network, the modulation of all blocks): memory-bound, so each weight is read once
// for ROWS samples. Rows and their gradients are f32, weights elem.
//
//   y = x W^T + b        x [B, K], W [N, K], b [N], y [B, N]
//   dx = dy W,  dW = dy^T x,  db = sum_b dy
#pragma once

#include "vector.cuh"

constexpr int ROWS = 8;           // samples at a time
constexpr int ROW_THREADS = 256;
constexpr int ROW_WARPS = ROW_THREADS / 32;
constexpr int WARP_OUTPUTS = 4;   // of a warp of the forward kernel: what it reads of x serves them all
constexpr int K_COLUMNS = 256;    // inputs that a block reads at a time, or of a block of dx
constexpr int N_ROWS = 256;       // outputs whose dy a block of dx holds at a time
constexpr int WEIGHT_ROWS = 8;    // outputs of a warp of dW
constexpr int WEIGHT_COLUMNS = 128;  // and its inputs

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

__device__ __forceinline__ float silu_derivative(float x) {
    float s = 1.0f / (1.0f + expf(-x));
    return s * fmaf(x, 1.0f - s, 1.0f);
}

// Whether rows of K elements of the weight can be read in vectors.
__device__ __forceinline__ bool rows_are_vectors(const elem* weight, int K) {
    return K % WIDTH == 0 && is_aligned(weight);
}

template <int W>
__device__ __forceinline__ void rows_forward_of(
    float* y, const float* x, const elem* weight, const float* bias, int B, int K, int N
) {
    constexpr int VECTORS = K_COLUMNS / 32 / W;
    typedef LaneColumns<W> Lanes;
    constexpr int PIECE = Lanes::PIECE;
    __shared__ __align__(16) float inputs[ROWS][Lanes::floats(VECTORS)];
    int lane = threadIdx.x % 32, first = blockIdx.y * ROWS;
    int first_n = (blockIdx.x * ROW_WARPS + threadIdx.x / 32) * WARP_OUTPUTS;
    float sums[WARP_OUTPUTS * ROWS];
#pragma unroll
    for (int i = 0; i < WARP_OUTPUTS * ROWS; ++i) sums[i] = 0.0f;
    for (int k0 = 0; k0 < K; k0 += K_COLUMNS) {
        __syncthreads();
        for (int i = threadIdx.x * PIECE; i < ROWS * K_COLUMNS; i += ROW_THREADS * PIECE) {
            int r = i / K_COLUMNS, k = i % K_COLUMNS;
            if (first + r >= B || k0 + k >= K) continue;
            float piece[PIECE];
            load_floats(piece, x + (long long)(first + r) * K + k0 + k, true);
            store_floats(inputs[r] + Lanes::of(k), piece, true);
        }
        __syncthreads();
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            int k = k0 + (v * 32 + lane) * W;
            if (k >= K) continue;
            float weights[WARP_OUTPUTS][W];
#pragma unroll
            for (int j = 0; j < WARP_OUTPUTS; ++j) {
                Vector<W> vector;
                vector.load(weight + (long long)min(first_n + j, N - 1) * K + k);
                vector.unpack(weights[j]);
            }
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                if (first + r >= B) continue;
                float own[W];
                Lanes::load(own, inputs[r], v, lane);
#pragma unroll
                for (int j = 0; j < WARP_OUTPUTS; ++j)
#pragma unroll
                    for (int e = 0; e < W; ++e)
                        sums[r * WARP_OUTPUTS + j] = fmaf(own[e], weights[j][e], sums[r * WARP_OUTPUTS + j]);
            }
        }
    }
    float sum = warp_sums<WARP_OUTPUTS * ROWS>(sums);
    int b = first + lane / WARP_OUTPUTS, n = first_n + lane % WARP_OUTPUTS;
    if (b < B && n < N) y[(long long)b * N + n] = sum + bias[n];
}

// Grid: (ceil(N / (ROW_WARPS WARP_OUTPUTS)), ceil(B / ROWS)) blocks of ROW_THREADS.
__device__ __forceinline__ void rows_forward(
    float* y, const float* x, const elem* weight, const float* bias, int B, int K, int N
) {
    by_width(rows_are_vectors(weight, K), [&](auto vector) {
        rows_forward_of<decltype(vector)::COUNT>(y, x, weight, bias, B, K, N);
    });
}

template <int W>
__device__ __forceinline__ void rows_backward_input_of(
    float* parts, const float* dy, const elem* weight, int B, int K, int N
) {
    constexpr int VECTORS = K_COLUMNS / 32 / W;
    typedef LaneColumns<W> Lanes;
    __shared__ __align__(16) float upstream[2][N_ROWS][4];
    __shared__ __align__(16) float shared[ROWS][Lanes::floats(VECTORS)];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.y * ROWS;
    int each = (N + gridDim.z - 1) / gridDim.z, end = min(N, ((int)blockIdx.z + 1) * each);
    float sums[ROWS][VECTORS][W];
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int v = 0; v < VECTORS; ++v)
#pragma unroll
            for (int e = 0; e < W; ++e) sums[r][v][e] = 0.0f;
    for (int n0 = blockIdx.z * each; n0 < end; n0 += N_ROWS) {
        int count = min(N_ROWS, end - n0);
        __syncthreads();
#pragma unroll
        for (int r = 0; r < ROWS; r += 4) {
            float four[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                bool inside = first + r + j < B && threadIdx.x < count;
                four[j] = inside ? dy[(long long)(first + r + j) * N + n0 + threadIdx.x] : 0.0f;
            }
            store_floats(upstream[r / 4][threadIdx.x], four, true);
        }
        __syncthreads();
#pragma unroll 2
        for (int i = warp; i < count; i += ROW_WARPS) {
            float of_rows[2][4];
            load_floats(of_rows[0], upstream[0][i], true);
            load_floats(of_rows[1], upstream[1][i], true);
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
                int k = blockIdx.x * K_COLUMNS + (v * 32 + lane) * W;
                if (k >= K) continue;
                Vector<W> vector;
                float weights[W];
                vector.load(weight + (long long)(n0 + i) * K + k);
                vector.unpack(weights);
#pragma unroll
                for (int r = 0; r < ROWS; ++r)
#pragma unroll
                    for (int e = 0; e < W; ++e) sums[r][v][e] = fmaf(of_rows[r / 4][r % 4], weights[e], sums[r][v][e]);
            }
        }
    }
    // One warp after the other adds its sums.
    for (int turn = 0; turn < ROW_WARPS; ++turn) {
        __syncthreads();
        if (warp != turn) continue;
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
                if (turn > 0) {
                    float before[W];
                    Lanes::load(before, shared[r], v, lane);
#pragma unroll
                    for (int e = 0; e < W; ++e) sums[r][v][e] += before[e];
                }
                Lanes::store(shared[r], sums[r][v], v, lane);
            }
    }
    __syncthreads();
    int k = blockIdx.x * K_COLUMNS + threadIdx.x;
    if (k >= K) return;
    for (int r = 0; r < ROWS && first + r < B; ++r)
        parts[((long long)blockIdx.z * B + first + r) * K + k] = shared[r][Lanes::of(threadIdx.x)];
}

// The part of dx that outputs `blockIdx.z` of `splits` give.  Grid: (ceil(K / K_COLUMNS), ceil(B / ROWS), splits) blocks of
// ROW_THREADS.
__device__ __forceinline__ void rows_backward_input(
    float* parts, const float* dy, const elem* weight, int B, int K, int N
) {
    by_width(rows_are_vectors(weight, K), [&](auto vector) {
        rows_backward_input_of<decltype(vector)::COUNT>(parts, dy, weight, B, K, N);
    });
}

template <int W>
__device__ __forceinline__ void rows_backward_weight_of(
    float* dweight, float* dbias, const float* dy, const float* x, int add, int B, int K, int N
) {
    int lane = threadIdx.x % 32, n0 = (blockIdx.y * ROW_WARPS + threadIdx.x / 32) * WEIGHT_ROWS;
    if (n0 >= N) return;
    bool whole = N % 4 == 0 && n0 + WEIGHT_ROWS <= N;
    if (blockIdx.x == 0 && lane < WEIGHT_ROWS && n0 + lane < N) {
        float sum = 0.0f;
        for (int b = 0; b < B; ++b) sum += dy[(long long)b * N + n0 + lane];
        dbias[n0 + lane] = add ? dbias[n0 + lane] + sum : sum;
    }
#pragma unroll
    for (int v = 0; v < WEIGHT_COLUMNS / 32 / W; ++v) {
        int k = blockIdx.x * WEIGHT_COLUMNS + (v * 32 + lane) * W;
        if (k >= K) continue;
        float sums[WEIGHT_ROWS][W];
#pragma unroll
        for (int i = 0; i < WEIGHT_ROWS; ++i)
#pragma unroll
            for (int e = 0; e < W; ++e) sums[i][e] = 0.0f;
#pragma unroll 2
        for (int b = 0; b < B; ++b) {
            float inputs[W], upstream[WEIGHT_ROWS];
            load_floats(inputs, x + (long long)b * K + k, true);
            const float* from = dy + (long long)b * N + n0;
            if (whole) {
                load_floats(upstream, from, true);
            } else {
#pragma unroll
                for (int i = 0; i < WEIGHT_ROWS; ++i) upstream[i] = n0 + i < N ? from[i] : 0.0f;
            }
#pragma unroll
            for (int i = 0; i < WEIGHT_ROWS; ++i)
#pragma unroll
                for (int e = 0; e < W; ++e) sums[i][e] = fmaf(upstream[i], inputs[e], sums[i][e]);
        }
#pragma unroll
        for (int i = 0; i < WEIGHT_ROWS; ++i) {
            if (n0 + i >= N) continue;
            float* to = dweight + (long long)(n0 + i) * K + k;
            if (add) {
                float before[W];
                load_floats(before, to, true);
#pragma unroll
                for (int e = 0; e < W; ++e) sums[i][e] += before[e];
            }
            store_floats(to, sums[i], true);
        }
    }
}

// A warp computes WEIGHT_ROWS x WEIGHT_COLUMNS.
// Grid: (ceil(K / WEIGHT_COLUMNS), ceil(N / (ROW_WARPS WEIGHT_ROWS))) blocks of ROW_THREADS.
__device__ __forceinline__ void rows_backward_weight(
    float* dweight, float* dbias, const float* dy, const float* x, int add, int B, int K, int N
) {
    if (K % 4 == 0 && is_aligned(dweight)) rows_backward_weight_of<4>(dweight, dbias, dy, x, add, B, K, N);
    else rows_backward_weight_of<1>(dweight, dbias, dy, x, add, B, K, N);
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
