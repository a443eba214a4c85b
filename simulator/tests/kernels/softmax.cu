// y = softmax(x) over each row: exp(x - max) / sum.
//
//   y (R, C)  written with =
//   x (R, C)
//   grid R, block a multiple of 32 up to 1024; any C >= 1

__device__ __forceinline__ float maximum(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ float sum(float a, float b) { return a + b; }

// Every thread gets the block's result.
template <float (*combine)(float, float)>
__device__ __forceinline__ float reduce(float value, float neutral) {
    __shared__ float part[32];
    for (int d = 16; d > 0; d /= 2) value = combine(value, __shfl_xor_sync(0xffffffffu, value, d));
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = value;
    __syncthreads();
    value = threadIdx.x % 32 < blockDim.x / 32 ? part[threadIdx.x % 32] : neutral;
    for (int d = 16; d > 0; d /= 2) value = combine(value, __shfl_xor_sync(0xffffffffu, value, d));
    return value;
}

extern "C" __global__ void softmax(float* __restrict__ y, const float* __restrict__ x, int c) {
    y += (long long)blockIdx.x * c;
    x += (long long)blockIdx.x * c;
    float most = -3.4e38f;
    for (int i = threadIdx.x; i < c; i += blockDim.x) most = fmaxf(most, x[i]);
    most = reduce<maximum>(most, -3.4e38f);
    float total = 0.0f;
    for (int i = threadIdx.x; i < c; i += blockDim.x) total += expf(x[i] - most);
    total = reduce<sum>(total, 0.0f);
    for (int i = threadIdx.x; i < c; i += blockDim.x) y[i] = expf(x[i] - most) / total;
}
