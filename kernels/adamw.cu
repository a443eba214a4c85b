// AdamW, the moving average of the weights, gradient clipping and the check for numbers that are not finite
// (formulas: src/train/optimizer.rs), over all parameters at once.
//
// norm (sums of squares by block), decide (the norm, the factor of clipping, whether to skip), adamw. What changes from step
// to step is in `factors`, so that a graph of the launches can be replayed.
#include "block_sum.cuh"
#include "vector.cuh"

constexpr int THREADS = 256;

enum Factor {
    BETA1, BETA2, ONE_MINUS_BETA1, ONE_MINUS_BETA2, DECAY, STEP, ROOT_CORRECTION, EPS, ONE_MINUS_EMA, CLIP
};

// What was decided: the norm of the gradients, their factor, and whether the update is left out (1) or made (0).
enum Decision { NORM, GRAD_SCALE, SKIP };

constexpr int AT_ONCE = 4;  // parameters of a thread

// Grid: any number of blocks of THREADS; each sums its share.
extern "C" __global__ void __launch_bounds__(THREADS) adamw_norm(
    double* __restrict__ parts,       // [blocks]
    const float* __restrict__ grads,  // [n]
    unsigned long long n
) {
    __shared__ double shared[THREADS];
    double sum = 0.0;
    unsigned long long thread = (unsigned long long)blockIdx.x * THREADS + threadIdx.x;
    unsigned long long whole = n / AT_ONCE;
#pragma unroll 4
    for (unsigned long long i = thread; i < whole; i += (unsigned long long)gridDim.x * THREADS) {
        float g[AT_ONCE];
        load_floats(g, grads + i * AT_ONCE, true);
#pragma unroll
        for (int e = 0; e < AT_ONCE; ++e) sum += (double)g[e] * g[e];
    }
    unsigned long long rest = whole * AT_ONCE + thread;
    if (rest < n) sum += (double)grads[rest] * grads[rest];
    sum = block_sum<THREADS>(sum, shared);
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
    sum = block_sum<THREADS>(sum, shared);
    unfit = block_sum<THREADS>(unfit, shared);
    if (threadIdx.x > 0) return;
    double norm = sqrt(sum);
    double clip = factors[CLIP];
    decision[NORM] = norm;
    decision[GRAD_SCALE] = clip > 0.0 && norm > clip ? clip / norm : 1.0;
    // A norm that is not a number is not below anything either.
    decision[SKIP] = unfit == 0.0 && norm < largest_norm ? 0.0 : 1.0;
}

// One parameter, fused and rounded as on the CPU: the same bits.
__device__ __forceinline__ void update(
    float& weight, float& ema, float& m, float& v, float grad, const float* factors, float grad_scale
) {
    float g = __fmul_rn(grad, grad_scale);
    m = __fmaf_rn(factors[BETA1], m, __fmul_rn(factors[ONE_MINUS_BETA1], g));
    v = __fmaf_rn(factors[BETA2], v, __fmul_rn(__fmul_rn(factors[ONE_MINUS_BETA2], g), g));
    float denominator = __fmaf_rn(__fsqrt_rn(v), factors[ROOT_CORRECTION], factors[EPS]);
    weight = __fadd_rn(__fmul_rn(weight, factors[DECAY]), -__fdiv_rn(__fmul_rn(factors[STEP], m), denominator));
    ema = __fmaf_rn(factors[ONE_MINUS_EMA], __fadd_rn(weight, -ema), ema);
}

__device__ __forceinline__ void store_rounded(float* to, const float (&x)[AT_ONCE]) { store_floats(to, x, true); }

__device__ __forceinline__ void store_rounded(bf16* to, const float (&x)[AT_ONCE]) {
    *(uint2*)to = make_uint2(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]));
}

// Grid: ceil(n / (AT_ONCE THREADS)) blocks of THREADS.
extern "C" __global__ void __launch_bounds__(THREADS, 2) adamw(
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
    unsigned long long first = ((unsigned long long)blockIdx.x * THREADS + threadIdx.x) * AT_ONCE;
    if (first >= n || decision[SKIP] != 0.0) return;
    float grad_scale = (float)decision[GRAD_SCALE];
    if (first + AT_ONCE <= n) {
        float w[AT_ONCE], e[AT_ONCE], m1[AT_ONCE], m2[AT_ONCE], g[AT_ONCE];
        load_floats(w, weights + first, true);
        load_floats(e, ema + first, true);
        load_floats(m1, m + first, true);
        load_floats(m2, v + first, true);
        load_floats(g, grads + first, true);
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) update(w[i], e[i], m1[i], m2[i], g[i], factors, grad_scale);
        store_floats(weights + first, w, true);
        store_floats(ema + first, e, true);
        store_floats(m + first, m1, true);
        store_floats(v + first, m2, true);
        if (rounded_weights) store_rounded(rounded_weights + first, w);
    } else {
        for (unsigned long long i = first; i < n; ++i) {
            update(weights[i], ema[i], m[i], v[i], grads[i], factors, grad_scale);
            if (rounded_weights) from_f32(rounded_weights[i], weights[i]);
        }
    }
}
