// C = A B in f32, two ways: one thread per element, and with tiles in shared memory.
//
//   c (M, N)  written with =
//   a (M, K), b (K, N)  row-major
//   grid (ceil(N / 16), ceil(M / 16)), block (16, 16); any M, N, K

#define TILE 16

extern "C" __global__ void matmul_naive(float* __restrict__ c, const float* __restrict__ a,
                                        const float* __restrict__ b, int m, int n, int k) {
    const int col = blockIdx.x * TILE + threadIdx.x;
    const int row = blockIdx.y * TILE + threadIdx.y;
    if (row >= m || col >= n) return;
    float sum = 0.0f;
    for (int i = 0; i < k; i++) sum += a[row * k + i] * b[i * n + col];
    c[row * n + col] = sum;
}

extern "C" __global__ void matmul_tiled(float* __restrict__ c, const float* __restrict__ a,
                                        const float* __restrict__ b, int m, int n, int k) {
    __shared__ float as[TILE][TILE];
    __shared__ float bs[TILE][TILE];
    const int tx = threadIdx.x, ty = threadIdx.y;
    const int col = blockIdx.x * TILE + tx;
    const int row = blockIdx.y * TILE + ty;
    float sum = 0.0f;
    for (int k0 = 0; k0 < k; k0 += TILE) {
        as[ty][tx] = row < m && k0 + tx < k ? a[row * k + k0 + tx] : 0.0f;
        bs[ty][tx] = k0 + ty < k && col < n ? b[(k0 + ty) * n + col] : 0.0f;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < TILE; i++) sum += as[ty][i] * bs[i][tx];
        __syncthreads();
    }
    if (row < m && col < n) c[row * n + col] = sum;
}
