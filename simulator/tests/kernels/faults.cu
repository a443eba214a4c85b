// One kernel for each class of fault: wrong with -DFAULTY=1, right with -DFAULTY=0.
//
//   y (n), x (n); grid 2, block 64, n = 128 - and `stop` a word that is never zero

extern "C" __global__ void out_of_bounds(float* y, const float* x, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = x[FAULTY ? i + 1 : i];
}

extern "C" __global__ void out_of_bounds_shared(float* y, const float* x, int n) {
    __shared__ float row[64];
    row[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
    __syncthreads();
    y[blockIdx.x * 64 + threadIdx.x] = row[threadIdx.x + (FAULTY ? n : 0) - (FAULTY ? 64 : 0)];
}

extern "C" __global__ void misaligned(float* y, const float* x, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    const char* p = (const char*)x + (FAULTY && i > 0 ? i * 4 - 2 : i * 4);
    y[i] = *(const float*)p;
}

extern "C" __global__ void uninitialised_global(float* y, const float* x, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    // Nobody wrote y.
    y[i] = FAULTY ? y[i] + x[i] : x[i];
}

extern "C" __global__ void uninitialised_shared(float* y, const float* x, int n) {
    __shared__ float row[64];
    if (!FAULTY || threadIdx.x != 5) row[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
    __syncthreads();
    y[blockIdx.x * 64 + threadIdx.x] = row[threadIdx.x];
}

extern "C" __global__ void uninitialised_local(float* y, const float* x, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    float mine[8];
    for (int j = FAULTY ? 1 : 0; j < 8; j++) mine[j * n / 128] = x[i];
    // A copy alone is no fault: compilers copy what they never use.
    y[i] = mine[i * n / 128 % 8] * (n / 128);
}

extern "C" __global__ void race_shared(float* y, const float* x, int n) {
    __shared__ float row[64];
    row[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
#if !FAULTY
    __syncthreads();
#endif
    y[blockIdx.x * 64 + threadIdx.x] = row[63 - threadIdx.x];
}

extern "C" __global__ void race_global(float* y, const float* x, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = x[i];
    __syncthreads();
#if FAULTY
    if (threadIdx.x == 0) y[0] += x[i];
#else
    if (threadIdx.x == 0 && blockIdx.x == 0) y[0] += x[i];
#endif
}

extern "C" __global__ void barrier_divergence(float* y, const float* x, int n) {
    __shared__ float row[64];
    row[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
    // Half of each warp takes another barrier.
    if (FAULTY && threadIdx.x % 2 == 0) {
        __syncthreads();
        row[threadIdx.x] += 1.0f;
    } else {
        __syncthreads();
    }
    y[blockIdx.x * 64 + threadIdx.x] = row[threadIdx.x];
}

extern "C" __global__ void async_copy(float* y, const float* x, int n) {
    __shared__ __align__(16) float row[64];
    if (threadIdx.x < 16) {
        const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(&row[threadIdx.x * 4]));
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(x + blockIdx.x * 64 + threadIdx.x * 4));
        asm volatile("cp.async.commit_group;");
#if !FAULTY
        asm volatile("cp.async.wait_group 0;" ::: "memory");
#endif
    }
    __syncthreads();
    y[blockIdx.x * 64 + threadIdx.x] = row[threadIdx.x];
}

extern "C" __global__ void endless(float* y, const float* x, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = x[i];
    int left = 100;
    while (FAULTY ? ((volatile float*)y)[i] == x[i] : left > 0) left--;
}

extern "C" __global__ void trap(float* y, const float* x, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (FAULTY && i == 7) asm volatile("trap;");
    y[i] = x[i];
}
