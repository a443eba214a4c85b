// The adaLN modulation of all blocks and the final layer as one layer (formulas: src/ops/modulation/mod.rs).
//
//   c [B, C] -> SiLU -> W [M, C], b [M] -> y [B, M]      here N = M, K = C
//
// Saved for backward: c, silu(c). Backward: weight (dW, db), input (parts of d silu(c)), sum_parts (dc).
#include "rows.cuh"

// Grid: that of rows_forward.
extern "C" __global__ void __launch_bounds__(LAYER_THREADS, 2) modulation_fwd(
    float* __restrict__ y,            // [B, N]
    const float* __restrict__ x,      // [B, K]
    const elem* __restrict__ weight,  // [N, K]
    const float* __restrict__ bias,   // [N]
    int B,
    int K,
    int N
) {
    rows_forward(y, x, weight, bias, B, K, N);
}

// y = silu(x).  Grid: ceil(n / LAYER_THREADS).
extern "C" __global__ void __launch_bounds__(LAYER_THREADS) modulation_fwd_silu(
    float* __restrict__ y,        // [n]
    const float* __restrict__ x,  // [n]
    unsigned int n
) {
    unsigned int i = blockIdx.x * LAYER_THREADS + threadIdx.x;
    if (i < n) y[i] = silu(x[i]);
}

// Grid: (ceil(K / WEIGHT_COLUMNS), ceil(N / WEIGHT_OUTPUTS)) blocks of LAYER_THREADS.
extern "C" __global__ void __launch_bounds__(LAYER_THREADS, 2) modulation_bwd_weight(
    float* __restrict__ dweight,  // [N, K]  = or +=
    float* __restrict__ dbias,    // [N]     = or +=
    const float* __restrict__ dy, // [B, N]
    const float* __restrict__ x,  // [B, K]
    int add,
    int B,
    int K,
    int N
) {
    rows_backward_weight(dweight, dbias, dy, x, add, B, K, N);
}

// Grid: that of rows_backward_input.
extern "C" __global__ void __launch_bounds__(LAYER_THREADS) modulation_bwd_input(
    float* __restrict__ parts,        // [splits, B, K]
    const float* __restrict__ dy,     // [B, N]
    const elem* __restrict__ weight,  // [N, K]
    int B,
    int K,
    int N
) {
    rows_backward_input(parts, dy, weight, B, K, N);
}

// Grid: ceil(n / LAYER_THREADS).
extern "C" __global__ void __launch_bounds__(LAYER_THREADS) modulation_bwd_sum_parts(
    float* __restrict__ dx,                 // [n]  = or +=
    const float* __restrict__ parts,        // [splits, n]
    const float* __restrict__ before_silu,  // [n], or null
    int splits,
    int add,
    unsigned int n
) {
    rows_sum_parts(dx, parts, before_silu, splits, add, n);
}
