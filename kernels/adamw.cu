// AdamW, the moving average of the weights, gradient clipping and the check for numbers that are not finite
// (formulas: src/train/optimizer.rs), over all parameters at once.
//
// norm (sums of squares by block), decide (the norm, the factor of clipping, whether to skip), adamw. What changes from step
// to step is in `factors`, so that a graph of the launches can be replayed.
#include "common.cuh"

constexpr int THREADS = 256;

enum Factor {
    BETA1, BETA2, ONE_MINUS_BETA1, ONE_MINUS_BETA2, DECAY, STEP, ROOT_CORRECTION, EPS, ONE_MINUS_EMA, CLIP
};

// What was decided: the norm of the gradients, their factor, and whether the update is left out (1) or made (0).
enum Decision { NORM, GRAD_SCALE, SKIP };

__device__ __forceinline__ double block_sum(double x, double* shared) {
    shared[threadIdx.x] = x;
    for (int step = THREADS / 2; step > 0; step /= 2) {
        __syncthreads();
        if (threadIdx.x < step) shared[threadIdx.x] += shared[threadIdx.x + step];
    }
    __syncthreads();
    return shared[0];
}

// Grid: any number of blocks of THREADS; each sums its share.
extern "C" __global__ void __launch_bounds__(THREADS) adamw_norm(
    double* __restrict__ parts,       // [blocks]
    const float* __restrict__ grads,  // [n]
    unsigned long long n
) {
    __shared__ double shared[THREADS];
    double sum = 0.0;
    for (unsigned long long i = (unsigned long long)blockIdx.x * THREADS + threadIdx.x; i < n;
         i += (unsigned long long)gridDim.x * THREADS)
        sum += (double)grads[i] * grads[i];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// Grid: one block of THREADS.
extern "C" __global__ void __launch_bounds__(THREADS) adamw_decide(
    double* __restrict__ decision,      // [3], see Decision
    const double* __restrict__ parts,   // [count]
    const float* __restrict__ losses,   // [loss_count]
    const float* __restrict__ factors,  // see Factor; CLIP is the largest norm, 0 for no clipping
    double largest_norm,                // a norm beyond it counts as not finite
    int count,
    int loss_count
) {
    __shared__ double shared[THREADS];
    double sum = 0.0, unfit = 0.0;
    for (int i = threadIdx.x; i < count; i += THREADS) sum += parts[i];
    for (int i = threadIdx.x; i < loss_count; i += THREADS)
        if (!(fabsf(losses[i]) < INFINITY)) unfit += 1.0;
    sum = block_sum(sum, shared);
    __syncthreads();
    unfit = block_sum(unfit, shared);
    if (threadIdx.x > 0) return;
    double norm = sqrt(sum);
    double clip = factors[CLIP];
    decision[NORM] = norm;
    decision[GRAD_SCALE] = clip > 0.0 && norm > clip ? clip / norm : 1.0;
    // A norm that is not a number is not below anything either.
    decision[SKIP] = unfit == 0.0 && norm < largest_norm ? 0.0 : 1.0;
}

// Grid: ceil(n / THREADS) blocks of THREADS. Fused and rounded as on the CPU: the same bits.
extern "C" __global__ void __launch_bounds__(THREADS) adamw(
    float* __restrict__ weights,          // [n]
    elem* __restrict__ rounded_weights,   // [n], or null: products read `weights`
    float* __restrict__ ema,              // [n]
    float* __restrict__ m,                // [n]
    float* __restrict__ v,                // [n]
    const float* __restrict__ grads,      // [n]
    const float* __restrict__ factors,    // see Factor
    const double* __restrict__ decision,  // see Decision
    unsigned long long n
) {
    unsigned long long i = (unsigned long long)blockIdx.x * THREADS + threadIdx.x;
    if (i >= n || decision[SKIP] != 0.0) return;
    float g = __fmul_rn(grads[i], (float)decision[GRAD_SCALE]);
    float first = __fmaf_rn(factors[BETA1], m[i], __fmul_rn(factors[ONE_MINUS_BETA1], g));
    float second = __fmaf_rn(factors[BETA2], v[i], __fmul_rn(__fmul_rn(factors[ONE_MINUS_BETA2], g), g));
    float denominator = __fmaf_rn(__fsqrt_rn(second), factors[ROOT_CORRECTION], factors[EPS]);
    float w = __fadd_rn(
        __fmul_rn(weights[i], factors[DECAY]), -__fdiv_rn(__fmul_rn(factors[STEP], first), denominator)
    );
    m[i] = first;
    v[i] = second;
    weights[i] = w;
    if (rounded_weights) from_f32(rounded_weights[i], w);
    ema[i] = __fmaf_rn(factors[ONE_MINUS_EMA], __fadd_rn(w, -ema[i]), ema[i]);
}
