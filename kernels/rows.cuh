// Linear layers of few rows (the timestep network, the modulation of all blocks): memory-bound, so a weight is read once for many
// samples. Rows and their gradients are f32, weights elem.
//
//   y = x W^T + b        x [B, K], W [N, K], b [N], y [B, N]
//   dx = dy W,  dW = dy^T x,  db = sum_b dy
//
// In bf16 y and dx are products by mma.sync (rows_mma.cuh). Here: dW, and y and dx by FMA, in f32 and, a number at a time, where rows
// in bf16 are no whole vectors.
#pragma once

#include "vector.cuh"

#ifdef ELEM_BF16
#include "rows_mma.cuh"
#endif

constexpr int ROWS = 8;  // samples at a time
constexpr int LAYER_THREADS = 256;
constexpr int LAYER_WARPS = LAYER_THREADS / 32;
constexpr int WARP_OUTPUTS = 4;   // of a warp of the forward kernel: what it reads of x serves them all
constexpr int K_COLUMNS = 256;    // inputs that a block reads at a time, or of a block of dx
constexpr int N_ROWS = 256;       // outputs whose dy a block of dx holds at a time
constexpr int WEIGHT_ROWS = 16;   // outputs of a warp of dW
constexpr int WEIGHT_COLUMNS = 128;  // and its inputs
constexpr int WEIGHT_OUTPUTS = LAYER_WARPS * WEIGHT_ROWS;  // of a block of dW
constexpr int WEIGHT_SAMPLES = 32;  // that it holds at a time
#ifdef ELEM_BF16
static_assert(MMA_THREADS * INPUT_BLOCKS <= LAYER_THREADS);  // so that their registers are there
#endif

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

__device__ __forceinline__ float silu_derivative(float x) {
    float s = 1.0f / (1.0f + expf(-x));
    return s * fmaf(x, 1.0f - s, 1.0f);
}

// Shared memory: inputs by LaneColumns.
typedef float FmaForwardMemory[ROWS][K_COLUMNS];
struct FmaInputMemory {
    float upstream[2][N_ROWS][4];
    float sums[ROWS][K_COLUMNS];
};

template <int W>
__device__ __forceinline__ void rows_forward_fma(
    FmaForwardMemory& inputs, float* y, const float* x, const elem* weight, const float* bias, int B, int K, int N
) {
    constexpr int VECTORS = K_COLUMNS / 32 / W;
    typedef LaneColumns<W> Lanes;
    constexpr int PIECE = Lanes::PIECE;
    static_assert(Lanes::floats(VECTORS) == K_COLUMNS);
    int lane = threadIdx.x % 32, first = blockIdx.y * ROWS;
    int first_n = (blockIdx.x * LAYER_WARPS + threadIdx.x / 32) * WARP_OUTPUTS;
    float sums[WARP_OUTPUTS * ROWS];
#pragma unroll
    for (int i = 0; i < WARP_OUTPUTS * ROWS; ++i) sums[i] = 0.0f;
    for (int k0 = 0; k0 < K; k0 += K_COLUMNS) {
        __syncthreads();
        for (int i = threadIdx.x * PIECE; i < ROWS * K_COLUMNS; i += LAYER_THREADS * PIECE) {
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

// Grid: (ceil(N / (LAYER_WARPS WARP_OUTPUTS)), ceil(B / ROWS)) blocks of LAYER_THREADS, or that of rows_forward_mma.
__device__ __forceinline__ void rows_forward(
    float* y, const float* x, const elem* weight, const float* bias, int B, int K, int N
) {
#ifdef ELEM_BF16
    __shared__ __align__(16) union {
        FmaForwardMemory fma;
        RowsMemory mma;
    } memory;
    if (are_mma_rows(weight, K, N)) rows_forward_mma(memory.mma, y, x, weight, bias, B, K, N);
    else rows_forward_fma<1>(memory.fma, y, x, weight, bias, B, K, N);
#else
    __shared__ __align__(16) FmaForwardMemory memory;
    by_width(K % WIDTH == 0 && is_aligned(weight), [&](auto vector) {
        rows_forward_fma<decltype(vector)::COUNT>(memory, y, x, weight, bias, B, K, N);
    });
#endif
}

template <int W>
__device__ __forceinline__ void rows_backward_input_fma(
    FmaInputMemory& memory, float* parts, const float* dy, const elem* weight, int B, int K, int N
) {
    constexpr int VECTORS = K_COLUMNS / 32 / W;
    typedef LaneColumns<W> Lanes;
    static_assert(Lanes::floats(VECTORS) == K_COLUMNS);
    auto& upstream = memory.upstream;
    auto& shared = memory.sums;
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
        for (int i = warp; i < count; i += LAYER_WARPS) {
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
    for (int turn = 0; turn < LAYER_WARPS; ++turn) {
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

// The part of dx that outputs `blockIdx.z` of `splits` give.
// Grid: (ceil(K / K_COLUMNS), ceil(B / ROWS), splits) blocks of LAYER_THREADS, or that of rows_backward_input_mma.
__device__ __forceinline__ void rows_backward_input(
    float* parts, const float* dy, const elem* weight, int B, int K, int N
) {
#ifdef ELEM_BF16
    __shared__ __align__(16) union {
        FmaInputMemory fma;
        InputMemory mma;
    } memory;
    if (are_mma_rows(weight, K, N)) rows_backward_input_mma(memory.mma, parts, dy, weight, B, K, N);
    else rows_backward_input_fma<1>(memory.fma, parts, dy, weight, B, K, N);
#else
    __shared__ __align__(16) FmaInputMemory memory;
    by_width(K % WIDTH == 0 && is_aligned(weight), [&](auto vector) {
        rows_backward_input_fma<decltype(vector)::COUNT>(memory, parts, dy, weight, B, K, N);
    });
#endif
}

// Columns from `first` on of samples from b0 on, four at a time where `aligned`; zeros beyond.
template <int COLUMNS>
__device__ __forceinline__ void copy_samples(
    float (*to)[COLUMNS], const float* from, int first, int columns, int b0, int B, bool aligned
) {
#pragma unroll
    for (int i = threadIdx.x * 4; i < WEIGHT_SAMPLES * COLUMNS; i += LAYER_THREADS * 4) {
        int s = i / COLUMNS, column = first + i % COLUMNS;
        float four[4] = {};
        const float* at = from + (long long)(b0 + s) * columns + column;
        if (b0 + s < B && column + 4 <= columns && aligned) {
            load_floats(four, at, true);
        } else if (b0 + s < B) {
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (column + e < columns) four[e] = at[e];
        }
        store_floats(to[s] + i % COLUMNS, four, true);
    }
}

template <int W>
__device__ __forceinline__ void rows_backward_weight_of(
    float (*upstream)[WEIGHT_OUTPUTS], float (*inputs)[WEIGHT_COLUMNS], float* dweight, float* dbias, const float* dy, const float* x,
    int add, int B, int K, int N
) {
    constexpr int VECTORS = WEIGHT_COLUMNS / 32 / W;
    int lane = threadIdx.x % 32, own = threadIdx.x / 32 * WEIGHT_ROWS;
    int first_n = blockIdx.y * WEIGHT_OUTPUTS, first_k = blockIdx.x * WEIGHT_COLUMNS;
    float sums[VECTORS][WEIGHT_ROWS][W], bias_sum = 0.0f;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v)
#pragma unroll
        for (int i = 0; i < WEIGHT_ROWS; ++i)
#pragma unroll
            for (int e = 0; e < W; ++e) sums[v][i][e] = 0.0f;
    for (int b0 = 0; b0 < B; b0 += WEIGHT_SAMPLES) {
        __syncthreads();
        copy_samples<WEIGHT_OUTPUTS>(upstream, dy, first_n, N, b0, B, N % 4 == 0 && is_aligned(dy));
        copy_samples<WEIGHT_COLUMNS>(inputs, x, first_k, K, b0, B, W == 4 && is_aligned(x));
        __syncthreads();
        int count = min(WEIGHT_SAMPLES, B - b0);
#pragma unroll 2
        for (int s = 0; s < count; ++s) {
            float of_outputs[WEIGHT_ROWS];
            load_floats(of_outputs, upstream[s] + own, true);
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
                float of_inputs[W];
                load_floats(of_inputs, inputs[s] + (v * 32 + lane) * W, true);
#pragma unroll
                for (int i = 0; i < WEIGHT_ROWS; ++i)
#pragma unroll
                    for (int e = 0; e < W; ++e) sums[v][i][e] = fmaf(of_outputs[i], of_inputs[e], sums[v][i][e]);
            }
        }
        if (blockIdx.x == 0 && threadIdx.x < WEIGHT_OUTPUTS)
            for (int s = 0; s < count; ++s) bias_sum += upstream[s][threadIdx.x];
    }
    int n = first_n + threadIdx.x;
    if (blockIdx.x == 0 && threadIdx.x < WEIGHT_OUTPUTS && n < N) dbias[n] = add ? dbias[n] + bias_sum : bias_sum;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        int k = first_k + (v * 32 + lane) * W;
        if (k >= K) continue;
#pragma unroll
        for (int i = 0; i < WEIGHT_ROWS; ++i) {
            if (first_n + own + i >= N) continue;
            float* to = dweight + (long long)(first_n + own + i) * K + k;
            if (add) {
                float before[W];
                load_floats(before, to, true);
#pragma unroll
                for (int e = 0; e < W; ++e) sums[v][i][e] += before[e];
            }
            store_floats(to, sums[v][i], true);
        }
    }
}

// A block computes WEIGHT_OUTPUTS x WEIGHT_COLUMNS, a warp WEIGHT_ROWS of these.
// Grid: (ceil(K / WEIGHT_COLUMNS), ceil(N / WEIGHT_OUTPUTS)) blocks of LAYER_THREADS.
__device__ __forceinline__ void rows_backward_weight(
    float* dweight, float* dbias, const float* dy, const float* x, int add, int B, int K, int N
) {
    __shared__ __align__(16) float upstream[WEIGHT_SAMPLES][WEIGHT_OUTPUTS], inputs[WEIGHT_SAMPLES][WEIGHT_COLUMNS];
    if (K % 4 == 0 && is_aligned(dweight)) rows_backward_weight_of<4>(upstream, inputs, dweight, dbias, dy, x, add, B, K, N);
    else rows_backward_weight_of<1>(upstream, inputs, dweight, dbias, dy, x, add, B, K, N);
}

// dx = silu'(x) times the sum of the parts of dx, or without SiLU.  Grid: ceil(B K / LAYER_THREADS).
__device__ __forceinline__ void rows_sum_parts(
    float* dx, const float* parts, const float* before_silu, int splits, int add, unsigned int n
) {
    unsigned int i = blockIdx.x * LAYER_THREADS + threadIdx.x;
    if (i >= n) return;
    float sum = 0.0f;
    for (int s = 0; s < splits; ++s) sum += parts[(unsigned long long)s * n + i];
    if (before_silu) sum *= silu_derivative(before_silu[i]);
    dx[i] = add ? dx[i] + sum : sum;
}
