// y = (x - mean) * rstd * weight + bias over each row, in two passes, so that a large mean costs no precision.
//
//   y (R, C), rstd (R)  written with =
//   x (R, C), weight (C), bias (C)
//   grid ceil(R / 4), block 128: one warp per row; any C >= 1

extern "C" __global__ void layernorm(float* __restrict__ y, float* __restrict__ rstd, const float* __restrict__ x,
                                     const float* __restrict__ weight, const float* __restrict__ bias, int r, int c,
                                     float eps) {
    const int row = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= r) return;
    y += (long long)row * c;
    x += (long long)row * c;
    float mean = 0.0f;
    for (int i = lane; i < c; i += 32) mean += x[i];
    for (int d = 16; d > 0; d /= 2) mean += __shfl_xor_sync(0xffffffffu, mean, d);
    mean /= c;
    float var = 0.0f;
    for (int i = lane; i < c; i += 32) var += (x[i] - mean) * (x[i] - mean);
    for (int d = 16; d > 0; d /= 2) var += __shfl_xor_sync(0xffffffffu, var, d);
    const float scale = rsqrtf(var / c + eps);
    for (int i = lane; i < c; i += 32) y[i] = (x[i] - mean) * scale * weight[i] + bias[i];
    if (lane == 0) rstd[row] = scale;
}
