// Noise, noisy images, and the training loss with its gradient (formulas: src/diffusion/loss.rs).
//
//   x_t = signal x_start + spread noise
//   mse = weight mean((answer - target)^2),  vb = the variational bound in bits,  loss = mse + vb
//   target = of_noise noise - of_start x_start
//
// What a sample's timestep says is in `steps`, f64: f32 would lose what is left of 1 - alphas_cumprod.
#include "block_sum.cuh"
#include "random.cuh"

// Numbers of a sample in `steps`.
enum Step { SIGNAL, SPREAD, OF_NOISE, OF_START, MEAN_FACTOR, PRECISION, MIN_LOG, RANGE, WEIGHT, COEFFICIENT, IS_FIRST, STEP_NUMBERS };

constexpr int THREADS = 256;

// Standard normal numbers, bit for bit those of the CPU.  Grid: ceil(B ceil(n / 4) / THREADS).
extern "C" __global__ void __launch_bounds__(THREADS) diffusion_loss_noise(
    float* __restrict__ noise,                 // [B, n]
    const unsigned int* __restrict__ counters, // the step, then [B] numbers of the samples
    unsigned int key_low,                      // the seed
    unsigned int key_high,
    unsigned int stream,
    int B,
    int n
) {
    int blocks = (n + 3) / 4;
    long long index = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (index >= (long long)B * blocks) return;
    int b = (int)(index / blocks), block = (int)(index % blocks);
    Words words = philox(Words{(unsigned int)block, counters[1 + b], counters[0], stream << 28}, key_low, key_high);
    float normal[4];
    box_muller(words.x, words.y, normal[0], normal[1]);
    box_muller(words.z, words.w, normal[2], normal[3]);
    for (int i = 0; i < 4 && block * 4 + i < n; ++i) noise[(long long)b * n + block * 4 + i] = normal[i];
}

// Grid: ceil(B n / THREADS).
extern "C" __global__ void __launch_bounds__(THREADS) diffusion_loss_q_sample(
    float* __restrict__ x_t,            // [B, n]
    const float* __restrict__ x_start,  // [B, n]
    const float* __restrict__ noise,    // [B, n]
    const double* __restrict__ steps,   // [B, STEP_NUMBERS]
    int B,
    int n
) {
    long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (i >= (long long)B * n) return;
    const double* step = steps + i / n * STEP_NUMBERS;
    // Not fused, as on the CPU.
    x_t[i] = (float)__dadd_rn(__dmul_rn(step[SIGNAL], x_start[i]), __dmul_rn(step[SPREAD], noise[i]));
}

// Distribution function of a normal number in its tanh form, and its derivative.
__device__ __forceinline__ double cdf(double z, double& slope) {
    const double c = 0.79788456080286535588;
    double t = tanh(c * (z + 0.044715 * z * z * z));
    slope = 0.5 * (1.0 - t * t) * c * (1.0 + 3.0 * 0.044715 * z * z);
    return 0.5 * (1.0 + t);
}

// Logarithm of the probability of an 8-bit level, and its derivative with respect to log_scale.
__device__ __forceinline__ double log_likelihood(double x, double mean, double log_scale, double& slope) {
    double inverse_scale = exp(-log_scale);
    double upper = inverse_scale * (x - mean + 1.0 / 255.0), lower = inverse_scale * (x - mean - 1.0 / 255.0);
    double d_upper, d_lower;
    double cdf_upper = cdf(upper, d_upper), cdf_lower = cdf(lower, d_lower);
    double probability = cdf_upper - cdf_lower;
    d_lower = -d_lower;
    if (x < -0.999) {
        probability = cdf_upper;
        d_lower = 0.0;
    } else if (x > 0.999) {
        probability = 1.0 - cdf_lower;
        d_upper = 0.0;
    }
    if (probability < 1e-12) {
        slope = 0.0;
        return log(1e-12);
    }
    slope = -(d_upper * upper + d_lower * lower) / probability;
    return log(probability);
}

// Grid: B blocks, one a sample.
extern "C" __global__ void __launch_bounds__(THREADS) diffusion_loss(
    float* __restrict__ losses,           // [3, B]: mse, vb, their sum
    float* __restrict__ d_model_out,      // [B, parts, n]: gradient of sum_b COEFFICIENT_b loss_b
    const float* __restrict__ model_out,  // [B, parts, n]: the answer, and with parts = 2 the variance's v
    const float* __restrict__ x_start,    // [B, n]
    const float* __restrict__ noise,      // [B, n]
    const double* __restrict__ steps,     // [B, STEP_NUMBERS]
    int parts,
    int B,
    int n
) {
    __shared__ double shared[THREADS];
    int b = blockIdx.x;
    const double* step = steps + (long long)b * STEP_NUMBERS;
    const double ln2 = 0.69314718055994530942;
    double per_element = 1.0 / n, squares = 0.0, bound = 0.0;
    for (int i = threadIdx.x; i < n; i += THREADS) {
        long long at = (long long)b * parts * n + i, pixel = (long long)b * n + i;
        double error = model_out[at] - (step[OF_NOISE] * noise[pixel] - step[OF_START] * x_start[pixel]);
        squares += error * error;
        d_model_out[at] = (float)(step[COEFFICIENT] * step[WEIGHT] * 2.0 * per_element * error);
        if (parts < 2) continue;
        double above = 0.5 * (model_out[at + n] + 1.0) * step[RANGE], difference = step[MEAN_FACTOR] * error, slope;
        if (step[IS_FIRST] != 0.0) {
            double log_scale = 0.5 * (step[MIN_LOG] + above), d_log_scale;
            bound -= log_likelihood(x_start[pixel], x_start[pixel] - difference, log_scale, d_log_scale);
            slope = -0.25 * step[RANGE] * d_log_scale;
        } else {
            double q = (1.0 + difference * difference * step[PRECISION]) * exp(-above);
            bound += 0.5 * (above - 1.0 + q);
            slope = 0.25 * step[RANGE] * (1.0 - q);
        }
        d_model_out[at + n] = (float)(step[COEFFICIENT] * per_element / ln2 * slope);
    }
    squares = block_sum<THREADS>(squares, shared);
    bound = block_sum<THREADS>(bound, shared);
    if (threadIdx.x > 0) return;
    double mse = step[WEIGHT] * squares * per_element, vb = bound * per_element / ln2;
    losses[b] = (float)mse;
    losses[B + b] = (float)vb;
    losses[2 * B + b] = (float)(mse + vb);
}
